"""The kinds of panels of the dashboards, and the queries that recur in them.

A panel is a title, what it tells, a unit and its queries. Grafana's own SDK knows the format and places the panels in order, on
24 columns.
"""

from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = "vitrine-prometheus"  # the uid in provisioning/datasources
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
LABEL_VALUES = 1  # of the kinds of queries that a variable can have
HEIGHT, STAT_HEIGHT = 8, 4
SIXTH, THIRD, HALF, WHOLE = 4, 8, 12, 24


def rate(metric: str, selector: str, by: str = "") -> str:
    """Per second, summed over everything but the labels `by`."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{selector}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """`part` / `whole`, zero where there is no such part yet, and nothing while there is no whole."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def ratio(part: str, whole: str, selector: str, by: str = "") -> str:
    """How much of one metric comes on one of another, and nothing while there is none of the other."""
    return f"{rate(part, selector, by)} / ({rate(whole, selector, by)} > 0)"


def mean(histogram: str, selector: str, by: str) -> str:
    return ratio(f"{histogram}_sum", f"{histogram}_count", selector, by)


def quantile(q: float, histogram: str, selector: str, by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', selector, f'{by}, le' if by else 'le')})"


def quantiles(histogram: str, selector: str, *qs: float) -> dict[str, str]:
    return {f"p{100 * q:g}": quantile(q, histogram, selector) for q in qs}


def query(legend: str, expression: str, position: int = 0) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(SOURCE).ref_id(chr(ord("A") + position)).expr(expression).legend_format(legend)
    return target.range()


def placed(panel: Any, title: str, tells: str, unit: str, *, width: int = HALF, height: int = HEIGHT) -> Any:
    return panel.title(title).description(tells).unit(unit).datasource(SOURCE).span(width).height(height)


def lines(title: str, tells: str, unit: str, queries: dict[str, str], width: int = HALF, *, stacked: bool = False) -> Any:
    """A chart over time; `queries` by the legend of their series."""
    panel = (
        placed(timeseries.Panel(), title, tells, unit, width=width).min(0).line_width(1).show_points(options.VisibilityMode.NEVER)
    )
    panel.fill_opacity(30 if stacked else 10).span_nulls(False)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(options.LegendDisplayMode.TABLE)
        .placement(options.LegendPlacement.RIGHT)
        .show_legend(True)
        .calcs(["mean", "max"])
    )
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    for position, (legend, expression) in enumerate(queries.items()):
        panel.with_target(query(legend, expression, position))
    return panel


def number(title: str, tells: str, unit: str, expression: str, *steps: tuple[float, str]) -> Any:
    """The newest value, green below the first of `steps`: values from which it has another colour."""
    panel = placed(stat.Panel(), title, tells, unit, width=SIXTH, height=STAT_HEIGHT).graph_mode(options.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    colours = [model.Threshold(value=None, color="green"), *(model.Threshold(value=value, color=colour) for value, colour in steps)]
    panel.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(colours))
    return panel.with_target(query("", expression))


def heat_map(title: str, tells: str, histogram: str, selector: str) -> Any:
    panel = placed(heatmap.Panel(), title, tells, "s").calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit("s").axis_placement(options.AxisPlacement.LEFT))
    panel.cell_values(heatmap.CellValues().unit("reqps"))
    panel.color(heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).exponent(0.5))
    expression = rate(f"{histogram}_bucket", selector, "le")
    return panel.with_target(query("{{le}}", expression).format(PromQueryFormat.HEATMAP))


def labels_table(title: str, tells: str, expression: str, *columns: str) -> Any:
    """One row per series, its labels as `columns`."""
    panel = placed(table.Panel(), title, tells, "short", width=WHOLE, height=6)
    panel.with_target(query("", expression).format(PromQueryFormat.TABLE).instant())
    order = {name: position for position, name in enumerate(columns)}
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
    return panel.with_transformation(
        model.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "indexByName": order})
    )


def variable(name: str, label: str, tells: str, metric: str) -> build.QueryVariable:
    """Values of a label of `metric`, all of them by default."""
    return (
        build.QueryVariable(name)
        .label(label)
        .description(tells)
        .datasource(SOURCE)
        .query({"qryType": LABEL_VALUES, "query": f"label_values({metric}, {name})", "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(model.VariableOption(text="All", value="$__all"))
    )


def dashboard(uid: str, title: str, tells: str, chosen: build.QueryVariable, rows: dict[str, list[Any]]) -> model.Dashboard:
    built = (
        build.Dashboard(title)
        .uid(uid)
        .description(tells)
        .tags(["vitrine"])
        .timezone("browser")
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            build.DashboardLink("Vitrine")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["vitrine"])
            .keep_time(True)
            .as_dropdown(True)
        )
        .with_variable(
            build.DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(model.VariableOption(text="Prometheus", value=DATASOURCE))
        )
        .with_variable(chosen)
    )
    panels = 0
    for heading, members in rows.items():
        panels += 1
        built.with_row(build.Row(heading).id(panels))
        for panel in members:
            panels += 1
            built.with_panel(panel.id(panels))
    return built.build()

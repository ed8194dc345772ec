/** Charts over time, drawn by uPlot (a global of its own script) in the colours of status.css. */

/* global uPlot */

const HEIGHT = 220;
const KEPT = 300; // rows
const SHOWN_AT_LEAST = 60; // rows' worth of time, so that the first ones are not stretched over the whole width

/** One chart in the figure `id`; `series` maps each custom property with its colour to its label. */
export class Chart {
  /** @param {{every: number, stacked?: boolean}} options `every` is the seconds between rows */
  constructor(id, series, { every, stacked = false }) {
    this.figure = document.getElementById(id);
    this.series = Object.entries(series);
    this.every = every;
    this.stacked = stacked;
    this.rows = [];
    this.draw();
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.figure);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Add what was seen at `time` (Unix seconds): one value per series, or null where there is none. */
  add(time, values) {
    this.rows = [...this.rows, { time, values }].slice(-KEPT);
    this.plot.setData(this.data());
    this.showLatest();
  }

  /** (Re)make the plot: its colours are fixed when it is made. */
  draw() {
    const heading = this.figure.querySelector("h2").textContent;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), this.data(), this.figure);
    const canvas = this.figure.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${heading}, over time; the current numbers are in the text of this page.`);
    this.showLatest();
  }

  /** The legend gives the latest values while the pointer is elsewhere. */
  showLatest() {
    if (this.rows.length > 0 && !(this.plot.cursor.left >= 0)) this.plot.setLegend({ idx: this.rows.length - 1 });
  }

  size() {
    const { paddingLeft, paddingRight } = getComputedStyle(this.figure);
    return { width: this.figure.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight), height: HEIGHT };
  }

  /** Columns for uPlot. Stacked series are sums, the tallest first, so that each later one covers the foot of those before. */
  data() {
    const heights = this.rows.map(({ values }) => (this.stacked ? runningSums(values) : values));
    return [this.rows.map(({ time }) => time), ...this.order().map((index) => heights.map((values) => values[index]))];
  }

  order() {
    const indices = this.series.map((_, index) => index);
    return this.stacked ? indices.reverse() : indices;
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 } };
    const lines = this.order().map((index) => {
      const [name, label] = this.series[index];
      const value = (_, __, ___, row) => format(this.rows[row]?.values[index]);
      const fill = this.stacked ? colour(name) : undefined;
      return { label, stroke: colour(name), fill, width: this.stacked ? 1 : 2, points: { show: false }, value };
    });
    return {
      ...this.size(),
      cursor: { drag: { setScale: false } }, // the next row would undo a zoom
      series: [{ label: "Time", value: (_, seconds) => clock(seconds) }, ...lines],
      scales: {
        x: { range: (_, first, last) => [Math.min(first, last - SHOWN_AT_LEAST * this.every), last] },
        y: { range: (_, __, highest) => [0, highest > 0 ? 1.1 * highest : 1] },
      },
      axes: [
        { ...axis, size: 34, space: 90, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 56 },
      ],
    };
  }
}

function runningSums(values) {
  let sum = 0;
  return values.map((value) => (value === null ? null : (sum += value)));
}

function clock(seconds) {
  return seconds === null ? "–" : new Date(1000 * seconds).toLocaleTimeString();
}

function format(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString(undefined, { maximumSignificantDigits: 3 });
}

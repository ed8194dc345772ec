"""The Grafana dashboards, written down once: `make docs` renders them to `dashboards/`, which Grafana reads."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.panels import (
    THIRD,
    dashboard,
    heat_map,
    labels_table,
    lines,
    mean,
    number,
    quantile,
    quantiles,
    rate,
    ratio,
    share,
    variable,
)

DASHBOARDS = Path(__file__).parent / "dashboards"

GATEWAY = 'job="vitrine", instance=~"$instance"'
MODEL = 'job="vitrine", model=~"$model"'
ENGINE = 'job="vitrine", engine=~"($model)([.@].*)?"'
TRITON = 'job="triton", model=~"$model"'
REQUESTS, STAGES = "vitrine_request_seconds", "vitrine_stage_seconds"
SERVER_ERRORS = f'{GATEWAY}, code=~"5.."'
ANSWERED = f'{GATEWAY}, code="200"'
SECONDS_PER_REQUEST = f"{rate(f'{STAGES}_sum', GATEWAY, 'stage')} / on () group_left () ({rate(f'{REQUESTS}_count', GATEWAY)} > 0)"

OVERVIEW = dashboard(
    "vitrine-overview",
    "Vitrine overview",
    "The gateway: what is asked, how fast it is answered, where the time goes, and what is turned away.",
    variable("instance", "Gateway", "host:port of the gateways to add up", 'up{job="vitrine"}'),
    {
        "Now": [
            number("Requests", "Requests answered per second, errors included.", "reqps", rate(f"{REQUESTS}_count", GATEWAY)),
            number(
                "Error share",
                "Requests answered 5xx, of all.",
                "percentunit",
                share(rate(f"{REQUESTS}_count", SERVER_ERRORS), rate(f"{REQUESTS}_count", GATEWAY)),
                (0.005, "orange"),
                (0.02, "red"),
            ),
            number("p50", "Half of the requests answered 200 are faster.", "s", quantile(0.5, REQUESTS, ANSWERED)),
            number(
                "p99", "One request of a hundred is slower.", "s", quantile(0.99, REQUESTS, ANSWERED), (0.25, "orange"), (1, "red")
            ),
            number(
                "In flight",
                "Requests that hold a place; VITRINE_MAX_REQUESTS bounds them.",
                "short",
                f"sum (vitrine_requests_in_flight{{{GATEWAY}}})",
                (128, "orange"),
                (192, "red"),
            ),
            number(
                "Backends down",
                "Gateways whose inference backend cannot compute.",
                "short",
                f"sum (1 - vitrine_backend_up{{{GATEWAY}}})",
                (1, "red"),
            ),
        ],
        "Traffic and errors": [
            lines(
                "Requests by status",
                "Requests per second, by HTTP status.",
                "reqps",
                {"{{code}}": rate(f"{REQUESTS}_count", GATEWAY, "code")},
                stacked=True,
            ),
            lines(
                "Error share by task",
                "Requests answered 5xx, of all requests of the task.",
                "percentunit",
                {
                    "{{task}}": share(
                        rate(f"{REQUESTS}_count", SERVER_ERRORS, "task"),
                        rate(f"{REQUESTS}_count", GATEWAY, "task"),
                    )
                },
            ),
        ],
        "Latency": [
            lines(
                "Latency",
                "From the ticket to the answer, of requests answered 200.",
                "s",
                quantiles(REQUESTS, ANSWERED, 0.5, 0.9, 0.99),
            ),
            heat_map("Latency heatmap", "How many requests per second took how long; answered 200.", REQUESTS, ANSWERED),
            lines(
                "Where the time goes",
                "Seconds per request in each stage; the stack is about the mean latency. Images of one request add up.",
                "s",
                {"{{stage}}": SECONDS_PER_REQUEST},
                stacked=True,
            ),
            lines(
                "p99 of each stage",
                "One request of a hundred spends longer in the stage.",
                "s",
                {"{{stage}}": quantile(0.99, STAGES, GATEWAY, "stage")},
            ),
        ],
        "Batching and capacity": [
            lines(
                "Batch size",
                "Rows of one inference, on average. Embedded engine only; Triton has a dashboard of its own.",
                "short",
                {"{{engine}}": mean("vitrine_batch_size", GATEWAY, "engine")},
            ),
            lines(
                "Queue depth",
                "Calls that wait for an engine; VITRINE_MAX_QUEUE bounds them. Embedded engine only.",
                "short",
                {"{{engine}}": f"sum by (engine) (vitrine_queue_depth{{{GATEWAY}}})"},
            ),
            lines(
                "In flight",
                "Requests that hold a place; VITRINE_MAX_REQUESTS bounds them.",
                "short",
                {"{{instance}}": f"sum by (instance) (vitrine_requests_in_flight{{{GATEWAY}}})"},
            ),
            lines(
                "Rejections",
                "Requests answered 429 per second, by what was full.",
                "reqps",
                {"{{reason}}": rate("vitrine_rejected_total", GATEWAY, "reason")},
                stacked=True,
            ),
        ],
        "Images": [
            lines(
                "Images",
                "Images answered per second; one request may carry several.",
                "ops",
                {"{{model}}": rate("vitrine_images_total", GATEWAY, "model")},
                THIRD,
                stacked=True,
            ),
            lines(
                "Image bytes",
                "Encoded size of the images that decoded.",
                "bytes",
                quantiles("vitrine_image_bytes", GATEWAY, 0.5, 0.9, 0.99),
                THIRD,
            ),
            lines(
                "Image pixels",
                "Width x height of the images that decoded.",
                "short",
                quantiles("vitrine_image_pixels", GATEWAY, 0.5, 0.9, 0.99),
                THIRD,
            ),
            lines(
                "Images without an answer",
                "Images per second that met an error of their own, by its code.",
                "ops",
                {"{{code}}": rate("vitrine_image_failures_total", GATEWAY, "code")},
                stacked=True,
            ),
            lines(
                "Decode failures",
                "Images per second that did not decode, by what their bytes say they are.",
                "ops",
                {"{{format}}": rate("vitrine_decode_failures_total", GATEWAY, "format")},
                stacked=True,
            ),
        ],
        "Process": [
            lines(
                "CPU",
                "Cores that the gateway keeps busy. Empty when it runs several worker processes.",
                "short",
                {"{{instance}}": rate("process_cpu_seconds_total", GATEWAY, "instance")},
            ),
            lines(
                "Memory",
                "Resident memory of the gateway. Empty when it runs several worker processes.",
                "bytes",
                {"{{instance}}": f"sum by (instance) (process_resident_memory_bytes{{{GATEWAY}}})"},
            ),
        ],
    },
)

MODELS = dashboard(
    "vitrine-models",
    "Models",
    "Each model by itself. Requests that failed before their model was found count on the overview only.",
    variable("model", "Model", "name of the models to show", 'vitrine_model_info{job="vitrine"}'),
    {
        "What is loaded": [
            labels_table(
                "Loaded versions",
                "Every model version that is loaded, and where.",
                f"vitrine_model_info{{{MODEL}}} == 1",
                "model",
                "version",
                "engine",
                "precision",
                "instance",
            ),
        ],
        "Traffic and errors": [
            lines(
                "Requests",
                "Requests per second.",
                "reqps",
                {"{{model}}": rate(f"{REQUESTS}_count", MODEL, "model")},
                stacked=True,
            ),
            lines(
                "Images",
                "Images answered per second; one request may carry several.",
                "ops",
                {"{{model}}": rate("vitrine_images_total", MODEL, "model")},
                stacked=True,
            ),
            lines(
                "Requests by status",
                "Requests per second, by HTTP status.",
                "reqps",
                {"{{model}} {{code}}": rate(f"{REQUESTS}_count", MODEL, "model, code")},
                stacked=True,
            ),
            lines(
                "Error share",
                "Requests answered 4xx or 5xx, of all requests of the model.",
                "percentunit",
                {
                    "{{model}}": share(
                        rate(f"{REQUESTS}_count", f'{MODEL}, code!="200"', "model"),
                        rate(f"{REQUESTS}_count", MODEL, "model"),
                    )
                },
            ),
        ],
        "Latency": [
            lines(
                "p50",
                "Half of the requests answered 200 are faster.",
                "s",
                {"{{model}}": quantile(0.5, REQUESTS, f'{MODEL}, code="200"', "model")},
            ),
            lines(
                "p99",
                "One request of a hundred answered 200 is slower.",
                "s",
                {"{{model}}": quantile(0.99, REQUESTS, f'{MODEL}, code="200"', "model")},
            ),
            lines(
                "Stages",
                "Mean time that a request spends in a stage which it reaches.",
                "s",
                {"{{model}} {{stage}}": mean(STAGES, MODEL, "model, stage")},
                stacked=True,
            ),
            lines(
                "p99 of the inference",
                "One inference of a hundred takes longer, the wait for it not counted.",
                "s",
                {"{{model}}": quantile(0.99, STAGES, f'{MODEL}, stage="infer"', "model")},
            ),
        ],
        "Batching": [
            lines(
                "Batch size",
                "Rows of one inference, on average. Embedded engine only; Triton has a dashboard of its own.",
                "short",
                {"{{engine}}": mean("vitrine_batch_size", ENGINE, "engine")},
            ),
            lines(
                "Queue depth",
                "Calls that wait for an engine; VITRINE_MAX_QUEUE bounds them. Embedded engine only.",
                "short",
                {"{{engine}}": f"sum by (engine) (vitrine_queue_depth{{{ENGINE}}})"},
            ),
        ],
    },
)


def per_request(metric: str, by: str = "") -> str:
    """Seconds per successful request; Triton counts microseconds."""
    return f"{ratio(metric, 'nv_inference_request_success', TRITON, by)} / 1e6"


NOT_CANCELED = f'{TRITON}, reason!="CANCELED"'

TRITON_SERVER = dashboard(
    "vitrine-triton",
    "Triton",
    "The inference server behind the gateway: its queue, its engines and how well its batches are filled.",
    variable("model", "Model", "name of the models in Triton's repository", 'nv_inference_request_success{job="triton"}'),
    {
        "Traffic and errors": [
            lines(
                "Requests",
                "Successful inference requests per second.",
                "reqps",
                {"{{model}} {{version}}": rate("nv_inference_request_success", TRITON, "model, version")},
                stacked=True,
            ),
            lines(
                "Failures",
                "Failed inference requests per second, by reason. CANCELED is a client that left, REJECTED a full queue.",
                "reqps",
                {"{{model}} {{reason}}": rate("nv_inference_request_failure", TRITON, "model, reason")},
                stacked=True,
            ),
            lines(
                "Failure share",
                "Failed inference requests, those that the client gave up left out, of all.",
                "percentunit",
                {
                    "{{model}}": share(
                        rate("nv_inference_request_failure", NOT_CANCELED, "model"),
                        f"({rate('nv_inference_request_failure', NOT_CANCELED, 'model')}"
                        f" + {rate('nv_inference_request_success', TRITON, 'model')})",
                    )
                },
            ),
            lines(
                "Pending",
                "Inference requests that wait for their execution.",
                "short",
                {"{{model}}": f"sum by (model) (nv_inference_pending_request_count{{{TRITON}}})"},
            ),
        ],
        "Where the time goes": [
            lines(
                "Time per request",
                "Mean time in the queue, taking the inputs, computing and giving the outputs.",
                "s",
                {
                    "queue": per_request("nv_inference_queue_duration_us"),
                    "compute input": per_request("nv_inference_compute_input_duration_us"),
                    "compute infer": per_request("nv_inference_compute_infer_duration_us"),
                    "compute output": per_request("nv_inference_compute_output_duration_us"),
                },
                stacked=True,
            ),
            lines(
                "Time per request by model",
                "Mean time from arrival in Triton to the answer.",
                "s",
                {"{{model}}": per_request("nv_inference_request_duration_us", "model")},
            ),
        ],
        "Batching": [
            lines(
                "Batch efficiency",
                "Inferences per execution of the model: the mean batch. 1 means that nothing is merged.",
                "short",
                {"{{model}}": ratio("nv_inference_count", "nv_inference_exec_count", TRITON, "model")},
            ),
            lines(
                "Executions",
                "Executions of the model per second.",
                "ops",
                {"{{model}}": rate("nv_inference_exec_count", TRITON, "model")},
                stacked=True,
            ),
        ],
        "Host": [
            lines(
                "CPU", "Share of the host's CPUs that is busy.", "percentunit", {"{{instance}}": 'nv_cpu_utilization{job="triton"}'}
            ),
            lines(
                "Memory", "Memory of the host that is in use.", "bytes", {"{{instance}}": 'nv_cpu_memory_used_bytes{job="triton"}'}
            ),
        ],
    },
)


def rendered() -> dict[str, str]:
    """Every dashboard as the text of its file, by the file's name."""
    return {
        f"{each.uid}.json": json.dumps(each, cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"
        for each in (OVERVIEW, MODELS, TRITON_SERVER)
    }


if __name__ == "__main__":
    for name, text in rendered().items():
        (DASHBOARDS / name).write_text(text)

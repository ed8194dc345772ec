"""Every metric of the gateway, as constants."""

from prometheus_client import Counter, Gauge, Histogram

STAGES = ("read", "parse", "decode", "resize", "queue", "infer", "finish", "encode")
LATENCY_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STAGE_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)

REQUEST_SECONDS = Histogram(
    "vitrine_request_seconds", "Time from the ticket to the answer.", ("task", "model", "code"), buckets=LATENCY_BUCKETS
)
STAGE_SECONDS = Histogram("vitrine_stage_seconds", "Time a request spent in a stage.", ("stage",), buckets=STAGE_BUCKETS)
IMAGES = Counter("vitrine_images", "Images answered.", ("task", "model"))
IMAGE_BYTES = Histogram("vitrine_image_bytes", "Encoded size of an image.", buckets=[4.0**power for power in range(5, 14)])
IMAGE_FAILURES = Counter("vitrine_image_failures", "Images refused, by the error's code.", ("code",))
REJECTED = Counter("vitrine_rejected", "Requests refused before any work, by reason.", ("reason",))
IN_FLIGHT = Gauge("vitrine_requests_in_flight", "Requests that hold a ticket.")
QUEUE_DEPTH = Gauge("vitrine_queue_depth", "Calls that wait for an engine.", ("engine",))
BATCH_SIZE = Histogram("vitrine_batch_size", "Rows of one inference.", ("engine",), buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64))
MODEL_INFO = Gauge("vitrine_model_info", "1 for each model version that is loaded.", ("model", "version", "engine", "precision"))
BACKEND_UP = Gauge("vitrine_backend_up", "1 when the inference backend can compute.", ("backend",))

for _stage in STAGES:
    STAGE_SECONDS.labels(_stage)

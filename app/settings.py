"""Every knob of the gateway: environment variables with the prefix `VITRINE_`, typed and ranged."""

import logging
import os
import re
import ssl
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.keys import ApiKey, parse_keys, read_keys
from app.logs import LogFormat

log = logging.getLogger("vitrine.settings")

TRITON_ADDRESS = r"(grpcs?://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}"
ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?")

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


def available_cpus() -> int:
    """Cores this process may use: its CPU affinity, capped by the cgroup's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def standard_endpoint() -> str:
    """Where OpenTelemetry's own variable says that traces go; empty when it is not set."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


class ModelSettings(BaseModel):
    """What one model does otherwise than the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instances: Count | None = None
    threads: Count | None = None
    max_batch: Count | None = None
    batch_delay: float | None = Field(None, ge=0, le=1)


class Settings(BaseSettings):
    """Read from the environment and from `.env`; command-line options of `vitrine serve` win."""

    model_config = SettingsConfigDict(
        env_prefix="VITRINE_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535)
    workers: Count = Field(1, description="processes that answer; the limits below that are of all together are shared out")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field("text", description="json: one object per line, with the request's id")
    otlp_endpoint: str = Field(
        default_factory=standard_endpoint, description="send traces to this OTLP/HTTP receiver, as in http://localhost:4318"
    )

    repository: Path = Field(Path("model_repository"), description="the Triton model repository to serve")
    repository_poll: float = Field(2.0, ge=0, description="seconds between looks for newly published models; 0 never looks")
    default_classify: str = Field("convnext-50", description="model that answers /v1/classify when none is named")
    default_tokenizer: str = Field(
        "vq-photo", description="model that answers /v1/tokenize, /v1/detokenize and /v1/reconstruct when none is named"
    )
    default_detect: str = Field("scenes-detector", description="model that answers /v1/detect when none is named")
    default_ground: str = Field("scenes-grounding", description="model that answers /v1/ground when none is named")
    default_embed: str = Field(
        "scenes-encoder",
        description="model that answers /v1/embed, /v1/embeddings, /v1/similarity and labels on /v1/classify when none is named",
    )
    default_chat: str = Field("scenes-chat", description="model that answers /v1/chat/completions when none is named")
    preload: bool = Field(True, description="load the default models before the server is ready")

    backend: Literal["onnxruntime", "triton", "fake"] = "onnxruntime"
    triton_url: str = Field(
        "127.0.0.1:8001",
        pattern=rf"^{TRITON_ADDRESS}(, *{TRITON_ADDRESS})*$",
        description="host:port of Triton's gRPC endpoint; several, with commas between, share the load",
    )
    triton_concurrency: Count = Field(64, description="calls in flight to one Triton")
    triton_shared_memory: Literal["auto", "on", "off"] = Field(
        "auto", description="give Triton its inputs in shared memory; auto does for one at a loopback address"
    )
    compute_threads: Count = Field(
        default_factory=available_cpus, description="threads that decode, resize and, on the CPU, infer (onnxruntime)"
    )
    instances: Count = Field(
        default_factory=available_cpus, description="inferences of one engine that run at a time (onnxruntime)"
    )
    threads: Count | None = Field(
        None, description="threads of one inference (onnxruntime); by default 1, and all for one that is alone with its engine"
    )
    batch_delay: float = Field(
        0.0, ge=0, le=1, description="seconds that a batch which is not full waits for more (onnxruntime); 0 never waits"
    )
    models: dict[str, ModelSettings] = Field(
        {},
        description='what single models do otherwise (onnxruntime), as in {"convnext-50": {"threads": 2}}',
    )
    max_queue: Count = Field(256, description="inferences of one engine that may wait (onnxruntime)")

    max_requests: Count = Field(256, description="requests in flight; more are answered 429")
    max_images: Count = Field(32, description="images in one request")
    max_texts: Count = Field(2048, description="texts in one request; labels times templates where they are classified")
    text_cache: int = Field(10_000, ge=0, description="texts whose vectors are kept, 2 to 4 KiB each; of every worker")
    max_body_bytes: Count = Field(32 * 1024 * 1024, description="size of one request body")
    max_body_bytes_in_flight: Count = Field(512 * 1024 * 1024, description="request bodies in memory, all together")
    max_image_pixels: Count = Field(64_000_000, description="width x height of one image")
    max_image_side: Count = Field(32_768, description="width or height of one image")
    max_image_scans: Count = Field(40, description="scans of a progressive JPEG; over no more than 10 times max_image_pixels")
    max_pixels_in_flight: Count = Field(128_000_000, description="decoded pixels in memory, all together (3 to 4 bytes each)")
    request_timeout: Seconds = Field(
        30.0, description="seconds for one request, from its headers to its answer; the header X-Request-Timeout asks for fewer"
    )
    max_connections: Count = Field(4096, description="connections of clients; where none is idle, more are answered 503")
    keep_alive: Count = Field(
        75, description="seconds that an idle connection is kept; longer than any client or balancer keeps it spares them resets"
    )
    client_grace: Seconds = Field(
        10.0, description="seconds that a client has for its headers, and to begin with a body or with taking an answer"
    )
    client_rate: Count = Field(1024, description="bytes per second that it must send or take on average after that")
    shutdown_delay: float = Field(
        0.0, ge=0, le=3600, description="seconds after SIGTERM that it still serves, no longer ready, so that balancers notice"
    )
    shutdown_timeout: Seconds = Field(
        30.0, description="seconds that requests in flight then have to finish, while new ones are answered 503"
    )

    chat_upstream: str = Field(
        "", pattern=r"^(https?://\S+)?$", description="server that answers chat in place of this one, as in http://localhost:8080"
    )
    chat_upstream_key: SecretStr | None = Field(None, description="its key; the key that a client sends never goes there")
    chat_upstream_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma list of the only models that clients may name; none: the server decides"
    )
    chat_upstream_timeout: Seconds = Field(60.0, description="seconds that this server may be silent, before and in its answer")
    chat_streams: Count = Field(4, description="answers of one chat model that grow side by side (onnxruntime)")
    chat_queue: Count = Field(16, description="questions to one chat model that may wait for their turn (onnxruntime)")
    chat_max_pixels: Count = Field(
        28 * 28 * 1280, description="width x height at which a chat model sees an image at most (onnxruntime)"
    )
    chat_timeout: Seconds = Field(300.0, description="seconds for one chat answer, from its read question to its last token")
    chat_max_tokens: Count = Field(4096, description="tokens of one answer that may be asked for")

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        (), description="comma list of API keys, as `vitrine key` prints their lines; without any, everyone may ask"
    )
    api_keys_file: Path | None = Field(None, description="a file of such lines, read again when it changes")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma list of the origins whose pages may ask from a browser, as in https://app.example.org; * is any"
    )
    tls_certfile: Path | None = Field(None, description="certificate chain in PEM: answer https, and nothing else")
    tls_keyfile: Path | None = Field(
        None, validate_default=True, description="its private key in PEM, without a password; none where it is in the same file"
    )

    allow_urls: bool = Field(False, description='let {"image": {"url": ...}} fetch http and https addresses')
    url_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), description="comma list of the only hosts that may be fetched from")
    url_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (), description="comma list of networks that are not public and may be fetched from all the same, as in 10.1.0.0/16"
    )
    url_redirects: int = Field(3, ge=0, le=20, description="redirects that are followed; each is checked as the first address is")
    url_timeout: Seconds = Field(10.0, description="seconds for one image, with its redirects")

    @property
    def wants_keys(self) -> bool:
        """Whether nobody may ask without a key; so too where the file of keys is empty."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @field_validator("otlp_endpoint")
    @classmethod
    def _can_trace(cls, value: str) -> str:
        """OpenTelemetry's own variable may be meant for other programs of the machine: what cannot be done for it is only told."""
        problem = None
        if value and not _installed("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
            problem = "traces need the extra `tracing`: pip install 'vitrine[tracing]'"
        elif value and not value.startswith(("http://", "https://")):
            problem = "an address begins with http:// or https://"
        if problem is not None and value == standard_endpoint():
            log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but nothing is traced: %s", problem)
            return ""
        if problem is not None:
            raise ValueError(problem)
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: object) -> object:
        return parse_keys(value) if isinstance(value, str) else value

    @field_validator("api_keys_file")
    @classmethod
    def _can_be_read(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_keys(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(origin == "*" or ORIGIN.fullmatch(origin) for origin in value):
            raise ValueError("an origin is https://HOST, or https://HOST:PORT, without a path")
        return value

    @field_validator("tls_keyfile")
    @classmethod
    def _belongs_to_the_certificate(cls, value: Path | None, known: ValidationInfo) -> Path | None:
        certificate = known.data.get("tls_certfile")
        if certificate is None and value is not None:
            raise ValueError("there is no tls_certfile for it")
        if certificate is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, value, password="")
            except OSError as error:
                raise ValueError(f"it cannot be used with {certificate}: {error.strerror or error}") from error
        return value

    @field_validator("cors_origins", "url_hosts", "url_networks", "chat_upstream_models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def warn_if_open(settings: Settings) -> None:
    """Say in the log when other machines may ask, and anyone of them."""
    try:
        local = settings.host == "localhost" or ip_address(settings.host).is_loopback
    except ValueError:
        local = False
    if not local and not settings.wants_keys:
        log.warning("anyone who reaches %s:%d may ask: no API keys are set; see VITRINE_API_KEYS", settings.host, settings.port)


def _installed(*modules: str) -> bool:
    try:
        return all(find_spec(module) for module in modules)
    except ModuleNotFoundError:
        return False

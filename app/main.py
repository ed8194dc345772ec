"""The composition root: settings -> backend -> catalog -> pipeline -> routes."""

import asyncio
import gc
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from app import __version__, logs, metrics
from app.admission import Admission, Pace, PixelBudget
from app.api import docs, errors, status
from app.api.admin import admin_router
from app.api.chat import PATH as CHAT_PATH
from app.api.chat import ChatService, chat_router
from app.api.chat_embedded import EmbeddedChat
from app.api.chat_upstream import UpstreamChat
from app.api.embeddings import PATH as EMBEDDINGS_PATH
from app.api.embeddings import embeddings_router
from app.api.exchange import Answerer
from app.api.fetch import FetchPolicy
from app.api.health import health_router
from app.api.keys import Access, RequireKey
from app.api.middleware import DirectPosts, RequestIds
from app.api.models import model_router
from app.api.services import Services
from app.api.tasks import task_endpoints, task_router
from app.backends.base import Backend, GeneratingBackend
from app.backends.fake import FakeBackend
from app.backends.onnxruntime import EngineOptions, OnnxRuntimeBackend
from app.backends.several import SeveralTritons
from app.backends.triton import TritonBackend
from app.catalog import Catalog
from app.chat import ChatModels
from app.chat_grounding import ChatGrounding
from app.compute import make_pool
from app.connections import connection_class, sweep
from app.decode import DecodeLimits
from app.errors import BackendUnavailableError, ModelNotChosenError, ModelNotFoundError, ModelUnavailableError
from app.generate import HOST
from app.golden import check_golden
from app.heap import keep_freed_memory
from app.pipeline import Pipeline
from app.settings import Settings, warn_if_open
from app.tasks import TASKS
from app.telemetry import Tracing
from app.text_vectors import TextVectors
from app.upstream import Upstream
from app.withdrawn import Withdrawn

log = logging.getLogger("vitrine")

PRELOAD_RETRY = 0.5
EXPOSED_HEADERS = ("X-Request-ID", "Server-Timing", "Retry-After", "WWW-Authenticate", "X-Model", "X-Codebook", "X-PSNR", "X-SSIM")
STARTUP_FAILURE = 3  # uvicorn's own exit code
DRAIN_SECONDS = 0.02  # between two looks whether all requests have finished
LAST_CALL_SECONDS = 0.2  # for what has connected before the port closed to send its request, and be refused in words


def create_app(settings: Settings, shared: Path | None = None) -> FastAPI:
    """The ASGI application. Its `state.services` are what it works with; once it has started, `state.preloading` is the task that
    loads the default models. `shared` is a directory for what all processes of this gateway know together."""
    pool = make_pool(settings.compute_threads)
    backend = make_backend(settings, pool)
    roles = _roles(settings, backend)
    metrics.begin((*TASKS, "chat"))
    defaults = _default_models(settings)
    smoke = _no_smoke if settings.backend == "fake" else check_golden
    catalog = Catalog(
        settings.repository,
        backend,
        smoke,
        defaults,
        grace=settings.request_timeout,
        chat_grace=settings.request_timeout + settings.chat_timeout,
        withdrawn=Withdrawn(shared),
    )
    pipeline = Pipeline(catalog, backend, _decode_limits(settings), PixelBudget(settings.max_pixels_in_flight), pool)
    tracing = Tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
    chat_models = ChatModels(pipeline, max_pixels=settings.chat_max_pixels)
    upstream = make_upstream(settings)
    access = Access(settings.api_keys, settings.api_keys_file, settings.workers)
    services = Services(
        admission=Admission(settings.max_requests, settings.max_body_bytes_in_flight, settings.request_timeout, _pace(settings)),
        pipeline=pipeline,
        texts=TextVectors(pipeline, settings.text_cache, settings.max_texts),
        catalog=catalog,
        fetching=_fetch_policy(settings),
        access=access,
        defaults=defaults,
        roles=roles,
        grounding=ChatGrounding(chat_models, pipeline, catalog, settings.default_ground),
        max_body_bytes=settings.max_body_bytes,
        max_images=settings.max_images,
        tracing=tracing,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        if upstream is not None:
            await upstream.start()
        await catalog.refresh()
        app.state.preloading = asyncio.create_task(_preload(catalog, services.default_roles() if settings.preload else {}))
        background = [app.state.preloading]
        if settings.repository_poll:
            background.append(asyncio.create_task(catalog.watch(settings.repository_poll)))
        if settings.api_keys_file is not None:
            background.append(asyncio.create_task(access.watch()))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            if upstream is not None:
                await upstream.close()
            await catalog.close()
            await backend.close()
            pool.shutdown(wait=False, cancel_futures=True)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Vitrine",
        version=__version__,
        description="Images in, answers out.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},  # it would ask per request
    )
    app.state.services = services
    errors.install(app)
    endpoints = task_endpoints(services)
    app.add_middleware(DirectPosts, endpoints=endpoints)
    _guard(app, settings, access)
    app.add_middleware(RequestIds)
    chat = ChatService(make_answerer(settings, pipeline, chat_models, upstream), settings.chat_timeout, settings.chat_max_tokens)
    inference = (task_router(endpoints), embeddings_router(services), chat_router(services, chat))
    for router in (*inference, model_router(services), admin_router(services, access.admin), health_router(services)):
        app.include_router(router)
    status.install(app)
    docs.install(app)
    return app


def _roles(settings: Settings, backend: Backend) -> dict[str, str]:
    """Of every task that this gateway answers itself, the role that a model must have for it."""
    roles = {task.name: task.role for task in TASKS.values()}
    if isinstance(backend, GeneratingBackend) and not settings.chat_upstream:
        roles["chat"] = HOST
    return roles


def _default_models(settings: Settings) -> dict[str, str]:
    """By the task's name; empty where none is set."""
    return {
        "classify": settings.default_classify,
        "detect": settings.default_detect,
        "ground": settings.default_ground,
        **dict.fromkeys(("embed", "similarity"), settings.default_embed),
        "chat": settings.default_chat,
        **dict.fromkeys(("tokenize", "detokenize", "reconstruct"), settings.default_tokenizer),
    }


def _decode_limits(settings: Settings) -> DecodeLimits:
    return DecodeLimits(
        max_bytes=settings.max_body_bytes,
        max_pixels=settings.max_image_pixels,
        max_side=settings.max_image_side,
        max_scans=settings.max_image_scans,
    )


def _fetch_policy(settings: Settings) -> FetchPolicy:
    return FetchPolicy(
        allowed=settings.allow_urls,
        hosts=settings.url_hosts,
        timeout=settings.url_timeout,
        max_bytes=settings.max_body_bytes,
        networks=settings.url_networks,
        redirects=settings.url_redirects,
    )


def _guard(app: FastAPI, settings: Settings, access: Access) -> None:
    """Keys stand before the routes, the rules for foreign pages around the keys: a browser asks without one if it may ask."""
    if access.required:
        app.add_middleware(RequireKey, access=access, openai_paths=(CHAT_PATH, EMBEDDINGS_PATH))
        docs.describe_keys(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )


def make_backend(settings: Settings, pool: Executor) -> Backend:
    """The backend that the settings name; one that computes in this process does it on `pool`."""
    if settings.backend == "triton":
        concurrency, shared_memory = settings.triton_concurrency, settings.triton_shared_memory
        addresses = [address.strip() for address in settings.triton_url.split(",")]
        servers = [TritonBackend(address, concurrency=concurrency, shared_memory=shared_memory) for address in addresses]
        return servers[0] if len(servers) == 1 else SeveralTritons(servers)
    if settings.backend == "fake":
        return FakeBackend()
    options = EngineOptions(
        instances=settings.instances,
        threads=settings.threads,
        most_threads=settings.compute_threads,
        batch_delay=settings.batch_delay,
    )
    models = {name: replace(options, **own.model_dump(exclude_none=True)) for name, own in settings.models.items()}
    return OnnxRuntimeBackend(
        pool,
        options,
        models=models,
        max_queue=settings.max_queue,
        chat_streams=settings.chat_streams,
        chat_queue=settings.chat_queue,
    )


def make_upstream(settings: Settings) -> Upstream | None:
    """The chat server behind this one, where the settings name one."""
    key = settings.chat_upstream_key
    if not settings.chat_upstream:
        return None
    return Upstream(settings.chat_upstream, None if key is None else key.get_secret_value(), silence=settings.chat_upstream_timeout)


def make_answerer(settings: Settings, pipeline: Pipeline, models: ChatModels, upstream: Upstream | None) -> Answerer:
    """Who answers chat: the server behind this one alone, where there is one."""
    if upstream is not None:
        return UpstreamChat(upstream, pipeline, settings.chat_upstream_models)
    return EmbeddedChat(models, max_tokens=settings.chat_max_tokens)


class _Server(uvicorn.Server):
    """Says once that it has begun: it listens, and the default models are loaded, or one of them cannot be. Ends without losing
    a request: it goes on listening, and saying so to those who come, until what is in flight has its answer."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, begun: Callable[[bool], None], *, delay: float = 0.0, timeout: float = 30.0
    ) -> None:
        """`delay`: seconds that it still serves when it is told to end. `timeout`: seconds that requests in flight then have."""
        super().__init__(config)
        self._app = app
        self._begun = begun
        self._delay = delay
        self._timeout = timeout
        self._background: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._background = [
                asyncio.create_task(self._announce()),
                asyncio.create_task(sweep(self.server_state.connections)),
            ]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Not ready any more, then closed to new requests, and at last to connections."""
        admission: Admission = self._app.state.services.admission
        admission.stopping = True
        log.info("shutting down with %d requests in flight", admission.tickets)
        await asyncio.sleep(self._delay)
        admission.closed = True
        until = time.monotonic() + self._timeout
        while admission.tickets and time.monotonic() < until and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_SECONDS)  # a second signal may end it too, which can set no event
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_CALL_SECONDS)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(until - time.monotonic()))  # for answers that are being sent
        await super().shutdown(sockets)
        for task in self._background:
            task.cancel()

    async def _announce(self) -> None:
        complete = await self._app.state.preloading
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look through it again and again
        self._begun(complete)


def serve(
    settings: Settings,
    begun: Callable[[bool], None] = lambda complete: None,
    listener: socket.socket | None = None,
    shared: Path | None = None,
) -> None:
    """Run the gateway in this process until SIGINT or SIGTERM, and return when every request that had begun has its answer.

    `begun` is called once, when it listens, with whether all of its default models answer. `listener` is a bound socket in place
    of the settings' address. `shared` is as for `create_app`.
    """
    logs.configure(settings.log_level, settings.log_format)
    if listener is None:  # else the parent has said it
        warn_if_open(settings)
    keep_freed_memory()
    app = create_app(settings, shared)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.tls_certfile,
        ssl_keyfile=settings.tls_keyfile,
        http=connection_class(settings.max_connections, _pace(settings)),
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        timeout_keep_alive=settings.keep_alive,
        server_header=False,
    )
    server = _Server(config, app, begun, delay=settings.shutdown_delay, timeout=settings.shutdown_timeout)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn sends itself again what has ended it
    with suppress(KeyboardInterrupt):
        server.run(None if listener is None else [listener])
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _pace(settings: Settings) -> Pace:
    return Pace(settings.client_grace, settings.client_rate)


async def _preload(catalog: Catalog, roles: Mapping[str, str]) -> bool:
    """Load the default model of every task of `roles`, waiting for a backend that is still away; False when one cannot serve.

    A task without a model, or with several and no default, is none's fault; a repository without any model is.
    """
    complete = not roles or bool(catalog.models)
    for task, role in roles.items():
        while True:
            try:
                version = await catalog.acquire(None, task, role)
                metrics.expect(task, version.manifest.model)
            except BackendUnavailableError as error:
                log.warning("waiting for the inference backend: %s", error)
                await asyncio.sleep(PRELOAD_RETRY)
                continue
            except (ModelNotChosenError, ModelNotFoundError) as error:
                log.info("nothing preloaded for %s: %s", task, error)
            except ModelUnavailableError as error:
                log.warning("nothing preloaded for %s: %s", task, error)
                complete = False
            break
    return complete


async def _no_smoke(backend: Backend, entry: object) -> None:
    """The fake backend invents its answers: there is nothing to compare."""

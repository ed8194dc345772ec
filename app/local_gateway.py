"""A gateway that lives as long as a block: what `--local` asks, and an evaluation without an address."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from app.main import create_app
from app.settings import Settings


class LocalGatewayError(Exception):
    """The gateway did not start; its log says why."""


@contextmanager
def local_gateway(settings: Settings) -> Iterator[str]:
    """A real gateway in a thread of this process, on a free port of this machine that only the block knows of: its address.

    It wants no API keys, whatever the settings say.

    Raises:
        LocalGatewayError: it did not start.
    """
    app = create_app(settings.model_copy(update={"api_keys": (), "api_keys_file": None}))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise LocalGatewayError("The local gateway did not start.")
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

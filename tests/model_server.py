"""A real chat server of another make, `transformers serve`, with a Qwen2.5-VL of random weights that is a few hundred kilobytes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from export.load import load
from export.sources.qwen2_5_vl import write_folder
from export.spec import ExportRequest, LoadedChat
from tests.gateway import environment, free_port

TRANSFORMERS = Path(sys.executable).with_name("transformers")
READY_SECONDS = 180
MOST_TOKENS = 8192


def make_model(folder: Path) -> None:
    """Write a model and its processor to `folder`, as transformers loads them. It never ends an answer by itself."""
    folder.mkdir(parents=True)
    write_folder(folder, text_config={"max_position_embeddings": MOST_TOKENS})
    request = ExportRequest(source=f"transformers/{folder}", repository=folder.parent, name="served", weights="random")
    loaded = load(request)
    assert isinstance(loaded, LoadedChat)
    loaded.network.generation_config.eos_token_id = None
    loaded.network.save_pretrained(folder)


@contextmanager
def model_server(folder: Path) -> Iterator[str]:
    """The address of a server of the model in `folder`; its log is `serve.log` beside it."""
    port = free_port()
    command = [TRANSFORMERS, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment() | {"HF_HUB_OFFLINE": "1"}, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + READY_SECONDS
        while not _healthy(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _healthy(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False

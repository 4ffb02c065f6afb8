"""A service of a tiny random model on a free port of this machine, and OpenAI's client."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest
import uvicorn
import yaml
from PIL import Image

from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import load_config
from minigpt4.server.service import Service
from minigpt4.server.start import bind, configure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_file(tiny_chat_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny random model."""
    values = {**tiny_chat_values, "chat": {"max_new_tokens": 12}}
    file = tmp_path_factory.mktemp("service") / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def load(tiny_file: Path) -> Callable[..., LoadedModel]:
    """Return a function that loads the tiny model with other `server.` limits."""

    def loaded(**limits: object) -> LoadedModel:
        options = [f"server.{name}={value}" for name, value in limits.items()]
        model = assemble(load_config(tiny_file, options))
        model.model.eval()
        return model

    return loaded


@contextmanager
def running(loaded: LoadedModel, key: str = "", name: str = "tiny") -> Iterator[tuple[Service, str]]:
    """Serve a model in a thread; yield the service and its address."""
    service = Service(loaded, name, key)
    with bind("127.0.0.1", 0) as listener:
        server = uvicorn.Server(configure(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield service, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(load: Callable[..., LoadedModel]) -> Iterator[tuple[Service, str]]:
    """The tiny model, served with small limits."""
    limits = {"max_body_megabytes": 0.5, "max_images": 3, "max_pixels": 40_000, "max_text_characters": 20_000}
    seconds = {"body_seconds": 1.0, "shutdown_seconds": 5.0}
    with running(load(**limits, **seconds, max_new_tokens=480)) as service:
        yield service


@pytest.fixture(scope="module")
def client(served: tuple[Service, str]) -> openai.OpenAI:
    return client_of(served[1])


@contextmanager
def process(
    config: Path, *options: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run `python -m minigpt4 serve`; yield the process, its address, and the lines that it logs."""
    command = [sys.executable, "-m", "minigpt4", "serve", "--cfg-path", str(config), "--port", "0"]
    command += ["--options", *options] if options else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*prefix, *command], stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            lines: list[str] = []
            while (found := re.search(r"serving tiny at (http://\S+)", "".join(lines))) is None:
                line = running.stderr.readline()
                assert line, "".join(lines)
                lines.append(line)
            threading.Thread(target=lambda: lines.extend(running.stderr), daemon=True).start()
            wait_until(lambda: _listens(found.group(1)))
            yield running, found.group(1), lines
        finally:
            running.kill()


def _listens(address: str) -> bool:
    try:
        return post(address, b"{")[0] == 400
    except OSError:
        return False


def memory(running: subprocess.Popen[str], name: str) -> float:
    """Return `VmRSS` or `VmHWM`, its largest value so far, in MB."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) * 1024 / 1e6


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0, timeout=60)


def noise(seed: int, size: int = 28) -> Image.Image:
    """Return an image of noise, different for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(image: Image.Image, text: str) -> dict[str, object]:
    """Return a user's message, the text before the image as clients write it."""
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_uri(image)}}]
    return {"role": "user", "content": parts}


JSON = {"Content-Type": "application/json"}


def post(address: str, content: bytes, headers: dict[str, str] = JSON) -> tuple[int, dict, dict]:
    """Send any bytes as a chat request; return the status, the reply and its headers."""
    request = Request(f"{address}/chat/completions", content, headers)
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer), _lower(answer.headers)
    except HTTPError as error:
        return error.code, json.load(error), _lower(error.headers)


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

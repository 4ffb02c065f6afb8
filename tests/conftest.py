"""What many tests need: a tiny model of each kind on disk, made once per session, and a config that trains it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from minigpt4.assets import expand, is_cached
from tests import REFERENCE

for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of a job that runs the tests
    os.environ.pop(name, None)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-dev-shm-usage"]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare `--pair`, which tests/conformance reads; here, because options are read from the first conftest only."""
    parser.addoption(
        "--pair", action="append", default=[], metavar="YAML", help="conformance: a pair of your own, instead of ours"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the mini assets where they are missing."""
    if item.get_closest_marker("mini") and not all(is_cached(name) for name in expand("mini")):
        pytest.skip("missing assets: python -m minigpt4 assets mini")


@pytest.fixture(autouse=True)
def _whatever_ran_before() -> Iterator[None]:
    """Start each test with the same random numbers, and put the log back, which `main` sets up for a whole process."""
    log = logging.getLogger("minigpt4")
    handlers, level = log.handlers[:], log.level
    torch.manual_seed(0)
    yield
    log.handlers[:] = handlers
    log.setLevel(level)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, one for all tests of a process: playwright allows no second one at the same time."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaMA of some thousand random weights, with the reference set's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    LlamaTokenizer.from_pretrained(REFERENCE, local_files_only=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an aligned set: twelve plain images, each with its colour as caption."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "image").mkdir()
    rows = []
    for n in range(12):
        name, colour = list(COLOURS.items())[n % len(COLOURS)]
        Image.new("RGB", (40 + n, 40), colour).save(folder / "image" / f"{n}.jpg")
        rows.append({"image_id": str(n), "caption": f"the image is {name} and its number is {n}"})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    return folder


EVA = {
    "type": "eva_vit_g",
    "weights": "random",
    "image_size": 28,
    "patch_size": 7,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "dtype": "float32",
}
"""Values of a tiny EVA-ViT: 16 patches and the class token, 16 wide."""


def tiny_model_values(tiny_llm: Path) -> dict[str, Any]:
    """Values of the model section of a tiny EVA + merge + LLaMA."""
    return {
        "vision_encoder": dict(EVA),
        "resampler": {"type": "merge", "neighbours": 4},
        "language_model": {"path": str(tiny_llm), "dtype": "float32"},
    }


@pytest.fixture(scope="session")
def tiny_chat_values(tiny_llm: Path) -> dict[str, Any]:
    """Values of a config that chats with the tiny model."""
    return {"model": tiny_model_values(tiny_llm), "conversation": {"template": "vicuna_v0"}}


@pytest.fixture
def tiny_values(tiny_llm: Path, pairs: Path, tmp_path: Path) -> dict[str, Any]:
    """Values of a config that trains a tiny EVA + merge + LLaMA on the pairs, in seconds."""
    return tiny_training_values(tiny_llm, pairs, tmp_path)


def tiny_training_values(tiny_llm: Path, pairs: Path, folder: Path) -> dict[str, Any]:
    """The same for fixtures of a wider scope; the run goes below `folder`."""
    return {
        "model": tiny_model_values(tiny_llm),
        "conversation": {"template": "vicuna_v0", "max_answer_tokens": 40},
        "datasets": {"train": {"pairs": {"type": "aligned_pairs", "path": str(pairs)}}},
        "run": {
            "output_dir": str(folder / "run"),
            "device": "cpu",
            "total_steps": 4,
            "global_batch_size": 4,
            "batch_size_per_rank": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "measure_attention": False,
            "log_every_steps": 1,
            "save_every_steps": 2,
        },
        "chat": {"max_new_tokens": 5},
    }


@pytest.fixture
def write_config(tmp_path: Path):
    """Return a function that writes values as YAML and returns the file."""

    def write(values: dict[str, Any], name: str = "config.yaml") -> Path:
        file = tmp_path / name
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

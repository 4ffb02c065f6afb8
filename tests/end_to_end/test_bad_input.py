"""The table of wrong inputs, and the one message that each must end in.

Every row is run through the command line: one error on standard error that says what to do, no traceback, exit
status 1. A row is a name, a change to a good config (`values`) in an empty folder (`here`), and the message.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.cli import main
from minigpt4.config.parts import EvaViTGConfig
from minigpt4.models.vision import EvaViTG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Values = dict[str, Any]
Spoil = Callable[[Values, Path], Any]
HUGE = Image.new("L", (11_000, 10_000))


def put(key: str, value: Any) -> Spoil:
    """Return a function that sets one key of the config; `{here}` stands for the folder."""

    def spoil(values: Values, here: Path) -> None:
        *path, last = key.split(".")
        for name in path:
            values = values.setdefault(name, {})
        values[last] = value.format(here=here) if isinstance(value, str) else value

    return spoil


def option(*given: str) -> Spoil:
    return lambda values, here: ["--options", *given]


def eva_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Return a function that writes changed weights of the config's image encoder."""

    def spoil(values: Values, here: Path) -> None:
        section = values["model"]["vision_encoder"]
        config = EvaViTGConfig(**{k: v for k, v in section.items() if k != "type"})
        torch.save(change(dict(EvaViTG(config).vit.state_dict())), here / "eva.pth")
        section["weights"] = str(here / "eva.pth")

    return spoil


def raw_weights(content: bytes) -> Spoil:
    def spoil(values: Values, here: Path) -> None:
        (here / "eva.pth").write_bytes(content)
        values["model"]["vision_encoder"]["weights"] = str(here / "eva.pth")

    return spoil


def truncated_weights(values: Values, here: Path) -> None:
    eva_weights(lambda tensors: tensors)(values, here)
    content = (here / "eva.pth").read_bytes()
    (here / "eva.pth").write_bytes(content[: len(content) // 2])


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def language_model(**files: str | None) -> Spoil:
    """Return a function that copies the language model with files changed or left out."""

    def spoil(values: Values, here: Path) -> None:
        section = values["model"]["language_model"]
        (here / "llm").mkdir()
        for file in Path(section["path"]).iterdir():
            change = files.get(file.stem, "same")
            content = file.read_bytes()
            if change is not None:
                (here / "llm" / file.name).write_bytes(content if change == "same" else content[: len(content) // 2])
        section["path"] = str(here / "llm")

    return spoil


def aligned(annotations: str | None, image: bytes | None = None) -> Spoil:
    """Return a function that writes an aligned set."""

    def spoil(values: Values, here: Path) -> None:
        (here / "data" / "image").mkdir(parents=True)
        if annotations is not None:
            (here / "data" / "filter_cap.json").write_text(annotations)
        if image is not None:
            (here / "data" / "image" / "0.jpg").write_bytes(image)
        values["datasets"]["train"] = {"set": {"type": "aligned_pairs", "path": str(here / "data")}}

    return spoil


def conversations(row: Values | str) -> Spoil:
    """Return a function that writes a set of one row about one good image."""

    def spoil(values: Values, here: Path) -> None:
        Image.new("RGB", (9, 9)).save(here / "0.png")
        (here / "rows.json").write_text(row if isinstance(row, str) else json.dumps([row]))
        values["datasets"]["train"] = {"set": {"type": "conversations", "path": str(here / "rows.json")}}

    return spoil


def shards(url: str, make: bool = False) -> Spoil:
    def spoil(values: Values, here: Path) -> None:
        if make:
            tarfile.open(here / url, "w").close()
        values["datasets"]["train"] = {"set": {"type": "web_pairs", "urls": [str(here / url)]}}

    return spoil


def asks(question: str, answer: str | None) -> list[Values]:
    answered = [] if answer is None else [{"from": "gpt", "value": answer}]
    return [{"from": "human", "value": question}, *answered]


def checkpoint(manifest: str) -> Spoil:
    def spoil(values: Values, here: Path) -> None:
        (here / "step_1").mkdir()
        (here / "step_1" / "manifest.json").write_text(manifest)
        values["model"]["init_from"] = str(here / "step_1")

    return spoil


def old_run(values: Values, here: Path) -> None:
    folder = Path(values["run"]["output_dir"]) / "checkpoints" / "step_9"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


PAIR = '{"annotations": [{"image_id": "0", "caption": "a"}]}'
TRAINING: list[tuple[str, Spoil, str]] = [
    # config
    ("unknown key", put("run.total_step", 3), "unknown key 'run.total_step'; did you mean 'total_steps'"),
    ("wrong type", put("run.total_steps", "many"), "run.total_steps must be a whole number, found 'many'"),
    ("number too small", put("run.total_steps", 0), "run.total_steps: must be at least 1"),
    (
        "missing required value",
        put("datasets.train.pairs.path", "???"),
        "required: set it in the YAML or pass --options datasets.train.pairs.path=PATH",
    ),
    ("unknown component", put("model.resampler.type", "merg"), "unknown resampler 'merg'. Did you mean 'merge'"),
    (
        "unknown template",
        put("conversation.template", "vicuna"),
        "must be one of chatml, llama2, plain, tokenizer, vicuna_v0",
    ),
    ("bad option", option("run.sed=1"), "unknown key 'run.sed'; did you mean 'seed'"),
    ("option without a value", option("run.seed"), "run.seed"),
    (
        "placeholder path",
        put("model.language_model.path", "/path/to/llm"),
        "model.language_model.path is still a placeholder",
    ),
    (
        "missing model folder",
        put("model.language_model.path", "{here}/llm"),
        "pass --options model.language_model.path=PATH",
    ),
    ("batch that does not divide", put("run.global_batch_size", 7), "run.global_batch_size 7 is not a multiple"),
    ("fp16 on a CPU", put("run.precision", "fp16"), "fp16 needs an accelerator"),
    ("no data set", put("datasets.train", {}), "datasets.train: names no data set"),
    ("missing checkpoint", put("model.init_from", "{here}/none"), "pass --options model.init_from=PATH"),
    ("damaged checkpoint", checkpoint("{"), "manifest.json: damaged"),
    ("existing run", old_run, "already holds a run, up to step_9: pass --options run.resume=true"),
    ("nothing trains", put("model.trainable", []), "model.trainable"),
    # weights
    ("truncated weights", truncated_weights, "eva.pth: truncated or not a weight file"),
    ("web page for weights", raw_weights(b"<!DOCTYPE html><html>"), "eva.pth: is a web page"),
    ("git-lfs pointer for weights", raw_weights(b"version https://git-lfs.github.com/spec/v1"), "git-lfs pointer"),
    ("foreign pickle", raw_weights(pickle.dumps(Foreign(), protocol=2)), "eva.pth: refused"),
    ("missing tensor", eva_weights(lambda t: {k: v for k, v in t.items() if k != "cls_token"}), "1 missing: cls_token"),
    (
        "tensor of another shape",
        eva_weights(lambda t: {**t, "cls_token": torch.zeros(1, 1, 3)}),
        "cls_token is (1, 1, 3), should be (1, 1, 16)",
    ),
    ("unexpected tensor", eva_weights(lambda t: {**t, "extra": torch.zeros(1)}), "1 unexpected: extra"),
    ("not a dictionary of tensors", eva_weights(lambda t: [1]), "contains a list, not a dictionary of tensors"),
    ("language model without config", language_model(config=None), "no config.json found"),
    ("language model truncated", language_model(model="cut"), "model.safetensors: truncated or not a safetensors file"),
    ("language model without tokenizer", language_model(tokenizer=None, tokenizer_config=None), "tokenizer"),
    # data
    (
        "missing data folder",
        put("datasets.train.pairs.path", "{here}/none"),
        "pass --options datasets.train.pairs.path=",
    ),
    ("missing filter_cap.json", aligned(None), "filter_cap.json"),
    ("broken JSON", aligned('{"annotations": [\n}'), "filter_cap.json:2: not valid JSON"),
    ("empty set", aligned('{"annotations": []}'), "with at least one annotation"),
    ("images not there", aligned(PAIR), "none of the 1 images"),
    ("all images broken", aligned(PAIR, b"\xff\xd8\xff broken"), "samples in a row could not be used (image: "),
    ("missing shard", shards("{0..1}.tar"), "2 of 2 shards are missing"),
    ("empty shard", shards("0.tar", make=True), "0.tar: the shard has no sample"),
    ("nothing to learn", conversations({"image": "0.png", "conversations": asks("What?", None)}), "has no answer"),
    ("empty answer", conversations({"image": "0.png", "conversations": asks("<image>?", " ")}), "the answer is empty"),
    (
        "more image marks than images",
        conversations({"image": "0.png", "conversations": asks("<image><image> What?", "a")}),
        "rows.json item 1",
    ),
    ("rows that are no list", conversations('{"a": 1}'), "must be a list of rows"),
]
CHAT: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing image", lambda file: None, "image file"),
    ("not an image", lambda file: file.write_text("hello"), "this is not an image"),
    ("empty file", lambda file: file.touch(), "the file is empty"),
    ("damaged image", lambda file: file.write_bytes(_jpeg()[:-500]), "the image is damaged"),
    (
        "huge image",
        lambda file: HUGE.save(file, "PNG", compress_level=1),
        "pixels are more than the allowed 100,000,000",
    ),
    ("folder for an image", lambda file: file.mkdir(), "this is a folder, not an image file"),
]


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(buffer, "JPEG")
    return buffer.getvalue()


def check(status: int, shown: str, message: str) -> None:
    assert status == 1, shown
    assert message in shown
    assert "Traceback" not in shown
    assert len(re.findall(r"^error", shown, re.MULTILINE)) == 1, shown


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in TRAINING], ids=[row[0] for row in TRAINING])
def test_training(spoil, message, tiny_values, write_config, tmp_path, capfd):
    (tmp_path / "here").mkdir()
    options = spoil(tiny_values, tmp_path / "here") or []
    check(main(["train", "--cfg-path", str(write_config(tiny_values)), *options]), capfd.readouterr().err, message)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in CHAT], ids=[row[0] for row in CHAT])
def test_chat(spoil, message, tiny_values, write_config, tmp_path, capfd):
    file = tmp_path / "picture.jpg"
    spoil(file)
    arguments = ["chat", "--cfg-path", str(write_config(tiny_values)), "--image", str(file), "--question", "What?"]
    status = main(arguments)
    shown = capfd.readouterr().err
    check(status, shown, message)
    assert "picture.jpg" in shown


STAGES = {
    "stage1_pretrain": [
        "model.vision_encoder.weights",
        "model.resampler.weights",
        "model.language_model.path",
        "datasets.train.laion.urls",
        "datasets.train.cc_sbu.urls",
    ],
    "stage2_finetune": [
        "model.vision_encoder.weights",
        "model.resampler.weights",
        "model.language_model.path",
        "model.init_from",
        "datasets.train.cc_sbu_align.path",
    ],
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_stages_name_everything_they_need_at_once(stage, tmp_path, capfd):
    """First every key that must be set, then, once they are, every missing file; nothing is loaded for either."""
    file = str(ROOT / "configs" / f"{stage}.yaml")
    status = main(["train", "--cfg-path", file])
    shown = capfd.readouterr().err
    check(status, shown, f"{len(STAGES[stage])} problems")
    for key in STAGES[stage]:
        assert f"pass --options {key}=PATH" in shown
    given = [
        f"{key}=[{tmp_path}/no/x.tar]" if key.endswith("urls") else f"{key}={tmp_path}/no" for key in STAGES[stage]
    ]
    status = main(["train", "--cfg-path", file, "--options", *given])
    shown = capfd.readouterr().err
    check(status, shown, "problems")
    for key in STAGES[stage]:
        assert re.search(rf"{re.escape(key)}[.\d]*: there is no file .* pass --options {re.escape(key)}", shown)


def test_as_processes(tiny_values, write_config, tmp_path):
    """The same through the scripts, as a user starts them; at the same time, so that their imports overlap."""
    file = str(write_config(tiny_values))
    commands: list[tuple[list[str], str]] = [
        ([str(ROOT / "train.py"), "--cfg-path", "stage1_pretran"], "Did you mean 'stage1_pretrain'"),
        (["-m", "minigpt4", "chat", "--cfg-path", file, "--image", "no.png", "--question", "?"], "image file"),
    ]
    started = [
        subprocess.Popen([sys.executable, *given], stderr=subprocess.PIPE, text=True, cwd=ROOT) for given, _ in commands
    ]
    for process, (_, message) in zip(started, commands, strict=True):
        shown = process.communicate(timeout=90)[1]
        check(process.returncode, shown, message)


def test_the_table_has_at_least_twenty_kinds():
    assert len(TRAINING) + len(CHAT) >= 20
    assert len({row[0] for row in (*TRAINING, *CHAT)}) == len(TRAINING) + len(CHAT)

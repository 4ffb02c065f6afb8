"""Encoder weights as other training tools save them; what does not fit is an error that says what differs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from minigpt4.errors import WeightsError
from tests.models.test_vision import perturbed, timm_encoder

pytestmark = pytest.mark.slow

NAME = "test_vit"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(0)
    return perturbed(timm.create_model(NAME))


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minigpt4")


def behind(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


TEXT = {"text.token_embedding.weight": torch.ones(3, 2), "logit_scale": torch.tensor(1.0)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
LAYOUTS: dict[str, tuple[Any, list[str]]] = {
    "bare": (lambda t: t, []),
    "model": (lambda t: {"model": t}, ["read from 'model'"]),
    "timm, Lightning": (lambda t: {"epoch": 3, "state_dict": t, "optimizer": OPTIMIZER}, ["read from 'state_dict'"]),
    "averaged as well": (
        lambda t: {"state_dict": t, "state_dict_ema": {n: x + 1 for n, x in t.items()}},
        ["read from 'state_dict'; state_dict_ema would fit as well"],
    ),
    "another key": (lambda t: {"step": torch.tensor(3), "net": t}, ["read from 'net'"]),
    "DeepSpeed": (lambda t: {"module": t, "dp_world_size": 8}, ["read from 'module'"]),
    "DDP": (lambda t: behind("module.", t), ["prefix 'module.' removed, 0 other tensors ignored"]),
    "open_clip": (
        lambda t: behind("visual.trunk.", t) | {"visual.head.proj.weight": torch.ones(2, 2)} | TEXT,
        ["prefix 'visual.trunk.' removed, 3 other tensors ignored"],
    ),
    "two prefixes": (
        lambda t: {"state_dict": behind("model.backbone.", t) | {"model.neck.weight": torch.ones(1)}},
        ["read from 'state_dict'", "prefix 'model.backbone.' removed, 1 other tensors ignored"],
    ),
    "bare and behind a prefix": (lambda t: {"state_dict": t, "teacher": behind("teacher.", t)}, ["teacher would fit"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tensors_are_found_and_a_line_says_where(layout, tensors, tmp_path, caplog):
    change, lines = LAYOUTS[layout]
    file = tmp_path / "weights.pth"
    torch.save(change(dict(tensors)), file)
    encoder = timm_encoder(NAME, str(file))
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    said = [record.getMessage() for record in caplog.records]
    head = f"{file}: classification head ignored: head.weight, head.bias"
    assert said[-1] == head
    assert len(said) == len(lines) + 1
    for line, message in zip(lines, said, strict=False):
        assert message.startswith(f"{file}: ")
        assert line in message


def test_a_prefix_in_safetensors(tensors, tmp_path):
    save_file(behind("encoder.", tensors), tmp_path / "weights.safetensors")
    encoder = timm_encoder(NAME, str(tmp_path / "weights.safetensors"))
    assert torch.equal(encoder.backbone.cls_token, tensors["cls_token"])


def test_the_norm_after_the_pooling_is_renamed_behind_a_prefix(tmp_path):
    tensors = perturbed(timm.create_model("test_vit2"))
    torch.save({"state_dict": behind("module.", tensors)}, tmp_path / "weights.pth")
    encoder = timm_encoder("test_vit2", str(tmp_path / "weights.pth"))
    assert torch.equal(encoder.backbone.norm.weight, tensors["fc_norm.weight"])


def test_a_wrapped_file_is_matched_by_order(tensors, tmp_path):
    given = {f"tensor {n}": t for n, t in enumerate(tensors.values())}
    torch.save({"state_dict": given, "optimizer": OPTIMIZER}, tmp_path / "weights.pth")
    encoder = timm_encoder(NAME, str(tmp_path / "weights.pth"), weights_match="order")
    assert torch.equal(encoder.backbone.cls_token, tensors["cls_token"])


@pytest.mark.parametrize("name", [NAME, "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "test_vit4"])
def test_the_position_embedding_is_resampled_as_timm_does(name, tmp_path, caplog):
    whole: Any = timm.create_model(name)
    own = whole.default_cfg["input_size"][1]
    patch = whole.patch_embed.patch_size[0]
    size = own + 4 * patch
    tensors = perturbed(whole)
    torch.save({"state_dict": tensors}, tmp_path / "weights.pth")
    encoder = timm_encoder(name, str(tmp_path / "weights.pth"), image_size=size)
    expected = checkpoint_filter_fn(dict(tensors), encoder.backbone)["pos_embed"]
    assert torch.equal(encoder.backbone.pos_embed, expected)
    assert encoder.backbone.pos_embed.shape != tensors["pos_embed"].shape
    side = own // patch
    assert f"pos_embed resampled from {side} x {side} to {side + 4} x {side + 4} patches" in caplog.text


REFUSED: dict[str, tuple[Any, str]] = {
    "one is missing": (
        lambda t: behind("module.", {n: x for n, x in t.items() if n != "cls_token"}),
        r"weights.pth, behind the prefix 'module.': \d+ tensors loaded; 1 missing: cls_token \(in the model, but not",
    ),
    "one is missing, others are unknown": (
        lambda t: behind("visual.", {n: x for n, x in t.items() if n != "cls_token"}) | TEXT,
        r"1 missing: cls_token .*2 unexpected: text.token_embedding.weight, logit_scale \(in the file, but not",
    ),
    "an unknown one behind the prefix": (
        lambda t: behind("visual.", t | {"blocks.0.ls1.gamma": torch.ones(2)}) | TEXT,
        r"1 unexpected: blocks.0.ls1.gamma \(in the file, but not in the model",
    ),
    "another width": (
        lambda t: {"state_dict": t | {"blocks.0.norm1.weight": torch.ones(7)}},
        r"weights.pth, 'state_dict': .*1 misfits: blocks.0.norm1.weight is \(7,\), should be \(64,\)",
    ),
    "positions that are no square": (
        lambda t: t | {"pos_embed": torch.ones(1, 8, 64)},
        r"pos_embed is \(1, 8, 64\), should be",
    ),
    "two encoders": (
        lambda t: behind("student.", t) | behind("teacher.", t),
        r"has this encoder 2 times, behind the prefixes student\., teacher\.; save one of them",
    ),
    "names of another library": (
        lambda t: {f"vision_model.{n.replace('blocks', 'encoder.layers')}": x for n, x in t.items()},
        r"78 renamed: vision_model.cls_token .* \(for blocks.0.norm1.weight\) and 73 more \(same shape",
    ),
    "nothing": (lambda t: {"epoch": 3, "note": "none"}, r"contains no tensors; its keys are epoch, note"),
    "a list": (lambda t: list(t.values()), r"contains a list, not a dictionary of tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_an_error_that_says_what_differs(kind, tensors, tmp_path):
    change, message = REFUSED[kind]
    file: Path = tmp_path / "weights.pth"
    torch.save(change(dict(tensors)), file)
    with pytest.raises(WeightsError, match=message):
        timm_encoder(NAME, str(file))

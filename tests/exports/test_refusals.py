"""What a pair lacks for LLaVA, Idefics3 and llama.cpp: each refusal says which change of YAML would meet it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from minigpt4.checkpoints.assemble import LoadedModel, assemble
from minigpt4.config import config_from_values
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import MISFIT, check_fits
from minigpt4.exports.needs import idefics3_keeps_positions
from tests.conformance.tiny import write_llm
from tests.towers import write_tower

LLAVA: dict[str, Any] = {"resampler": {"type": "patches"}}
IDEFICS3: dict[str, Any] = {
    "vision_encoder": {"layer": -1, "post_norm": True},
    "resampler": {"type": "pixel_shuffle"},
    "projector": {"type": "linear", "bias": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("parts")
    for tower in ("siglip", "whole clip", "dinov2"):
        write_tower(tower, made / tower)
    for llm in ("qwen3", "opt", "llama"):
        write_llm(llm, made / llm)
    return made


def pair(
    folder: Path, changes: dict[str, Any], tower: str = "siglip", llm: str = "qwen3", **sections: Any
) -> LoadedModel:
    encoder = {"type": "transformers", "path": str(folder / tower), **changes.get("vision_encoder", {})}
    language_model: dict[str, Any] = {"path": str(folder / llm), "dtype": "float32"}
    if "lora" in changes.get("trainable", []):
        language_model["lora"] = {"rank": 2}
    model = {**changes, "vision_encoder": encoder, "language_model": language_model}
    return assemble(config_from_values({"conversation": {"template": "chatml"}, **sections, "model": model}, "test"))


def refusal(loaded: LoadedModel, to: str) -> str:
    with pytest.raises(ExportError) as caught:
        check_fits(loaded, to)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "more", "reason"),
    [
        (LLAVA, {"tower": "whole clip"}, "llama.cpp puts the class token of a CLIP behind the patches"),
        (IDEFICS3, {}, "llama.cpp's projector mlp does not apply the tower's final norm"),
        (LLAVA, {"llm": "llama"}, "llama.cpp puts a blank behind every special token for this kind of tokenizer"),
        ({**LLAVA, "trainable": ["language_model"]}, {}, "goes with the unchanged language model"),
        ({**LLAVA, "trainable": ["llama_proj", "lora"]}, {}, "goes with the unchanged language model"),
    ],
    ids=["clip", "idefics3", "sentencepiece", "language model", "lora"],
)
def test_what_llama_cpp_would_answer_differently_is_refused(folder, changes, more, reason):
    assert reason in refusal(pair(folder, changes, **more), "mmproj")


def test_what_fits_is_accepted(folder):
    assert MISFIT["llava"](pair(folder, LLAVA)) == ""
    assert MISFIT["llava"](pair(folder, LLAVA, "whole clip")) == ""
    assert MISFIT["idefics3"](pair(folder, IDEFICS3)) == ""
    assert MISFIT["mmproj"](pair(folder, LLAVA)) == ""


def test_a_pair_that_fits_another_format_is_told_which(folder):
    found = refusal(pair(folder, IDEFICS3), "llava")
    assert "LLaVA does not apply the tower's final norm" in found
    assert found.endswith("use --to prompt-embeds or idefics3, or keep the checkpoint")
    assert "trained with" not in found


@pytest.mark.parametrize(
    ("changes", "more", "to", "change"),
    [
        ({"resampler": {"type": "pool", "grid": 2}}, {}, "llava", "model.resampler: {type: patches}"),
        ({**LLAVA, "vision_encoder": {"post_norm": True}}, {}, "llava", "model.vision_encoder.post_norm: false"),
        ({**LLAVA, "vision_encoder": {"image_size": 48}}, {}, "llava", "model.vision_encoder.image_size: 0"),
        (LLAVA, {"tower": "dinov2"}, "llava", "model.vision_encoder: {type: transformers, path: A_SIGLIP_FOLDER}"),
        (
            LLAVA,
            {"processors": {"image": {"resize": "letterbox"}}},
            "llava",
            "processors.image: {resize: stretch, max_side: 0}",
        ),
        (
            LLAVA,
            {"conversation": {"template": "chatml", "isolate_turns": True}},
            "llava",
            "conversation.isolate_turns: false",
        ),
        (
            {**IDEFICS3, "projector": {"type": "linear"}},
            {},
            "idefics3",
            "model.projector: {type: linear, bias: false}",
        ),
        (
            {**IDEFICS3, "vision_encoder": {}},
            {},
            "idefics3",
            "model.vision_encoder: {layer: -1, post_norm: true}",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_one_change_of_yaml_that_would_fit_is_named(folder, changes, more, to, change):
    found = refusal(pair(folder, changes, **more), to)
    assert f"(trained with {change}, it would fit --to {to}): use --to prompt-embeds, or keep" in found


def test_the_change_that_is_named_fits(folder):
    """The pair of the refusal above, with the change made."""
    refused = {**IDEFICS3, "projector": {"type": "linear"}}
    changed = {**refused, "projector": {"type": "linear", "bias": False}}
    assert "model.projector: {type: linear, bias: false}" in refusal(pair(folder, refused), "idefics3")
    check_fits(pair(folder, changed), "idefics3")


def test_the_fewest_changes_are_named(folder):
    found = refusal(pair(folder, {"resampler": {"type": "pixel_shuffle"}, "vision_encoder": {"layer": -1}}), "idefics3")
    assert "(trained with model.resampler: {type: patches}, it would fit --to llava)" in found


def test_language_models_that_these_formats_do_not_wire_are_refused_without_a_change(folder):
    found = refusal(pair(folder, LLAVA, llm="opt"), "llava")
    assert "this format supports llama, mistral, qwen2" in found
    assert (
        "this one is opt: use --to prompt-embeds or mmproj, or keep" in found
    )  # llama.cpp has it as a file of its own


def test_prompts_that_the_processor_would_build_differently_are_refused(folder):
    """A SentencePiece tokenizer puts a blank in front of the segments of `vicuna_v0`, and not inside a whole text."""
    loaded = pair(folder, LLAVA, llm="llama", conversation={"template": "vicuna_v0"})
    found = refusal(loaded, "llava")
    assert 'its prompt of 1 turn(s) has "<s>###Human: <Img" where this model was trained with "<s> ###Human' in found


@torch.no_grad()
def test_positions_of_idefics3_are_checked_for_each_grid():
    """19 x 19 patches are mixed up by transformers; 27 x 27, as SigLIP so400m has them, are not."""
    for rows in (4, 14, 16, 19, 24, 25, 27, 29):
        config = Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=rows, patch_size=1)
        embeddings = Idefics3VisionEmbeddings(config)
        embeddings.position_embedding.weight.copy_(torch.arange(rows**2.0)[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        mask = torch.ones(1, rows, rows, dtype=torch.bool)
        found = embeddings(torch.zeros(1, 3, rows, rows), mask)[0, :, 0]
        assert idefics3_keeps_positions(rows) == torch.equal(found, torch.arange(rows**2.0)), rows
    assert not idefics3_keeps_positions(19)
    assert idefics3_keeps_positions(27)

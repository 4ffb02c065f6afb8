"""Every model can be exported: what a refusal recommends works, and a trained language model goes with its prompts."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt4 import Chat
from minigpt4.cli.parser import build_parser
from minigpt4.errors import ExportError
from minigpt4.exports.fitting import MISFIT
from minigpt4.exports.formats import write
from minigpt4.exports.language_model import export_language_model
from minigpt4.exports.prompt_embeds import completion_request, prompt_embeds
from tests.conformance.tiny import LLMS, QFORMER, write_llm
from tests.conftest import EVA
from tests.exports.parts import noisy

pytestmark = pytest.mark.slow

ENCODERS = {
    "eva": EVA,
    "timm": {"type": "timm", "name": "test_vit", "weights": "random", "image_size": 64, "dtype": "float32"},
}
RESAMPLERS = {
    "qformer": QFORMER,
    "merge": {"type": "merge", "neighbours": 4},
    "pool": {"type": "pool", "grid": 2},
    "prefix": {"type": "prefix", "num_query_tokens": 4, "components": 4},
}
TRAINED = {"projection": ["llama_proj"], "lora": ["llama_proj", "lora"], "language model": ["language_model"]}
LINEAR = {
    "opt": ["q_proj", "fc2"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "down_proj"],
}


def export(loaded: Any, to: str, out: Path) -> None:
    write(loaded, to, out, question="Why?" if to == "prompt-embeds" else "")


@pytest.mark.parametrize(("encoder", "resampler", "trained"), itertools.product(ENCODERS, RESAMPLERS, TRAINED))
def test_a_refusal_names_only_formats_that_work(tiny_values, tmp_path, encoder, resampler, trained):
    tiny_values["model"] |= {"vision_encoder": ENCODERS[encoder], "resampler": RESAMPLERS[resampler]}
    tiny_values["model"]["trainable"] = TRAINED[trained]
    tiny_values["model"]["language_model"]["lora"] = {"rank": 2 if trained == "lora" else 0}
    loaded = noisy(tiny_values)
    accepted, named = set(), []
    for to in MISFIT:
        try:
            export(loaded, to, tmp_path / to)
            accepted.add(to)
        except ExportError as error:
            advice = re.findall(r": use --to (\S+(?: or \S+)*), or keep the checkpoint$", str(error))
            named.append({name for names in advice for name in names.split(" or ")})
    assert accepted == {path.name for path in tmp_path.iterdir() if path.name in MISFIT}
    assert all(names == accepted for names in named)
    published = encoder == "eva" and resampler in ("qformer", "merge") and trained == "projection"
    assert ("published" in accepted) == published
    assert ("huggingface" in accepted) == (encoder == "eva" and resampler == "qformer")


def test_the_command_line_offers_every_format():
    for to in MISFIT:
        build_parser().parse_args(["export", "mini", "--to", to, "--out", "out"])


def with_adapters(values: dict[str, Any], llm: Path, *targets: str, **settings: Any) -> Any:
    values["model"] |= {
        "vision_encoder": ENCODERS["timm"],
        "resampler": RESAMPLERS["pool"],
        "trainable": ["llama_proj", "lora"],
        "language_model": {
            "path": str(llm),
            "dtype": "float32",
            "lora": {"rank": 3, "alpha": 12, "target_modules": list(targets)},
            **settings,
        },
    }
    return noisy(values)


@torch.no_grad()
@pytest.mark.parametrize("family", LLMS)
def test_the_merged_language_model_of_every_family_computes_the_same(tiny_values, tmp_path, family):
    write_llm(family, tmp_path / "llm")
    loaded = with_adapters(tiny_values, tmp_path / "llm", *LINEAR.get(family, ["q_proj", "down_proj"]))
    export_language_model(loaded, tmp_path / "out")
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    plain, info = loading
    assert not any(info.values())
    ids = torch.tensor([[1, 5, 9, 3]])
    ours = loaded.model.language_model
    expected = ours(ours.embed(ids), None)
    assert expected.std() > 0.05
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert not torch.allclose(original(ids).logits, expected, atol=1e-2)  # the adapters matter
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("A red bird.").input_ids
    assert tokens == AutoTokenizer.from_pretrained(tmp_path / "llm")("A red bird.").input_ids


@torch.no_grad()
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_head_that_was_tied_is_written_apart_if_it_has_an_adapter(tiny_values, tmp_path, target):
    write_llm("qwen2", tmp_path / "llm")
    loaded = with_adapters(tiny_values, tmp_path / "llm", target)
    export_language_model(loaded, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not plain.config.tie_word_embeddings
    assert loaded.model.language_model.model.config.tie_word_embeddings  # the model in memory is as before
    ids, ours = torch.tensor([[1, 5, 9, 3]]), loaded.model.language_model
    torch.testing.assert_close(plain(ids).logits, ours(ours.embed(ids), None), atol=1e-4, rtol=1e-4)


def test_the_merged_language_model_keeps_its_precision(tiny_values, tiny_llm, tmp_path):
    loaded = with_adapters(tiny_values, tiny_llm, "q_proj", dtype="bfloat16")
    loaded.model.language_model.model.bfloat16()
    loaded.model.language_model.model.model.layers[0].self_attn.q_proj.lora_A.float()
    export_language_model(loaded, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("trained", ["projection", "lora"])
def test_the_example_in_the_folder_answers_as_our_chat(tiny_values, tiny_llm, pairs, tmp_path, trained):
    """A model with a timm encoder, for which prompt embeds are the only format; in a process without this package."""
    tiny_values["chat"]["max_new_tokens"] = 8
    loaded = with_adapters(tiny_values, tiny_llm, "q_proj", "down_proj")
    if trained == "projection":  # the original language model answers
        loaded.model.language_model.requires_grad_(False)
        state = AutoModelForCausalLM.from_pretrained(tiny_llm).state_dict()
        for name, tensor in loaded.model.language_model.model.state_dict().items():
            tensor.copy_(state[name.replace(".base_layer.", ".")] if ".lora_" not in name else torch.tensor(0.0))
    image = str(pairs / "image" / "0.jpg")
    write(loaded, "prompt-embeds", tmp_path / "out", images=[image], question="What is this?")
    folder = tmp_path / "out" / "language_model"
    assert folder.is_dir() == (trained == "lora")
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    assert request["model"] == str(folder if trained == "lora" else tiny_llm)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(tmp_path / "out" / "example.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"minigpt4" not in done.stderr  # the names of all imported modules
    answer = Chat(loaded).session(images=[image]).ask("What is this?")
    assert len(answer) > 5
    assert done.stdout.decode() == f"{answer}\n"


def test_a_request_for_the_original_language_model_is_refused_if_it_was_trained(tiny_values, tiny_llm):
    loaded = with_adapters(tiny_values, tiny_llm, "q_proj")
    embeds = prompt_embeds(loaded, [], "Why?")
    with pytest.raises(ExportError, match=r"this model's lora was trained, so the original .* export_language_model"):
        completion_request(loaded, embeds)
    assert completion_request(loaded, embeds, "merged")["model"] == "merged"

"""LLaVA and Idefics3: folders opened by transformers alone, in another process, give the same numbers and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.exports.formats import write
from minigpt4.exports.needs import FAMILIES
from minigpt4.models.splice import splice
from tests.conformance.tiny import CHATML, byte_tokenizer, sizes, write_llm
from tests.exports.parts import noisy
from tests.towers import write_tower

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("ask_pair_with_transformers.py")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOKENS = 12
LLAVA: dict[str, Any] = {"to": "llava", "resampler": {"type": "patches"}}
IDEFICS3: dict[str, Any] = {
    "to": "idefics3",
    "tower": "siglip",
    "encoder": {"layer": -1, "post_norm": True},
    "resampler": {"type": "pixel_shuffle"},
    "projector": {"type": "linear", "bias": False},
}
TWO_IMAGES: list[tuple[str, str | None]] = [
    ("Are <ImageHere> and <ImageHere> one?", "No."),
    ("Why not?", "Look.\nThey differ."),
    ("Sure?", None),
]
TESTED_ABOVE = ("qwen2", "qwen3", "gemma3_text")  # the last one is the family of the tiny model "gemma3"
CASES: dict[str, dict[str, Any]] = {
    "llava, clip, float64": {**LLAVA, "dtype": torch.float64},
    "llava, clip, gelu, float64": {**LLAVA, "layout": "gelu", "dtype": torch.float64},
    "llava, siglip, gelu": {**LLAVA, "tower": "siglip", "layout": "gelu", "turns": TWO_IMAGES, "images": 2},
    "llava, siglip, mlp, float64": {**LLAVA, "tower": "siglip", "projector": {"type": "mlp"}, "dtype": torch.float64},
    "llava, class token, tied head": {**LLAVA, "encoder": {"class_token": "keep", "layer": -3}, "llm": "qwen2"},
    "llava, no bias, last layer, adapters": {
        **LLAVA,
        "encoder": {"layer": -1},
        "projector": {"type": "linear", "bias": False},
        "lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
    },
    "idefics3, float64": {**IDEFICS3, "dtype": torch.float64},
    "idefics3, two images": {**IDEFICS3, "turns": TWO_IMAGES, "images": 2, "llm": "gemma3"},
    "idefics3, tied head": {**IDEFICS3, "llm": "qwen2", "turns": TWO_IMAGES, "images": 2},
    **{f"llava, {family}": {**LLAVA, "llm": family} for family in FAMILIES if family not in TESTED_ABOVE},
}
MAIN = (
    "llava, clip, float64",
    "llava, siglip, gelu",
    "llava, siglip, mlp, float64",
    "idefics3, float64",
    "idefics3, tied head",
)
MORE = tuple(name for name in CASES if name not in MAIN)


def llm_folder(family: str, folder: Path) -> Path:
    """Write a language model of a family with a tokenizer whose chat template has the marks of ChatML."""
    if family in ("qwen2", "gemma3"):
        write_llm(family, folder)
        return folder
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML)
    config = AutoConfig.for_model(family, **sizes(len(tokenizer), num_key_value_heads=2))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(case: dict[str, Any], folder: Path) -> LoadedModel:
    tower = write_tower(case.get("tower", "whole clip"), folder / "tower")
    trainable = ["llama_proj", *(["lora"] if "lora" in case else [])]
    llm = {"path": str(llm_folder(case.get("llm", "qwen3"), folder / "llm")), "dtype": "float32"}
    model = {
        "vision_encoder": {"type": "transformers", "path": str(tower), **case.get("encoder", {})},
        "resampler": case["resampler"],
        "projector": case.get("projector", {"type": "linear"}),
        "language_model": {**llm, "lora": case.get("lora", {"rank": 0})},
        "trainable": trainable,
    }
    return noisy({"model": model, "conversation": {"template": "tokenizer"}}, case.get("dtype", torch.float32))


def messages(turns: list[tuple[str, str | None]]) -> list[tuple[str, list[str | None]]]:
    """Messages as users of transformers write them; None is an image, and comes first if it has no mark."""
    found: list[tuple[str, list[str | None]]] = []
    for index, (question, answer) in enumerate(turns):
        texts = question.split("<ImageHere>")
        parts: list[str | None] = [texts[0]]
        for text in texts[1:]:
            parts += [None, text]
        if index == 0 and len(texts) == 1:
            parts.insert(0, None)
        found.append(("user", [part for part in parts if part != ""]))
        found += [("assistant", [answer])] if answer is not None else []
    return found


@torch.no_grad()
def expected(loaded: LoadedModel, case: dict[str, Any], images: list[str]) -> dict[str, Any]:
    dialogue = Dialogue(tuple(Turn(*turn) for turn in case.get("turns", [("What is this?", None)])))
    encoded = loaded.conversation.encode_prompt(dialogue, num_images=len(images))
    pixels = torch.stack([loaded.image_processor(image) for image in images]).to(case.get("dtype", torch.float32))
    model = loaded.model
    tokens = model.language_model.embed(encoded.input_ids.unsqueeze(0))
    row = splice(tokens, model.encode_images(pixels), encoded.image_mask.unsqueeze(0))
    logits, greedy = model.language_model(row, None)[0], []
    for _ in range(TOKENS):
        greedy.append(int(model.language_model(row, None)[0, -1].argmax()))
        row = torch.cat([row, model.language_model.embed(torch.tensor([[greedy[-1]]]))], dim=1)
    return {"encoded": encoded, "pixels": pixels, "logits": logits, "greedy": greedy, "loaded": loaded}


@pytest.fixture(
    scope="module", params=[pytest.param(MAIN, id="main"), pytest.param(MORE, id="more", marks=pytest.mark.long)]
)
def compared(request, tmp_path_factory):
    """Export a folder per case, ask all of them in one process without this package, and return both sides."""
    folder = tmp_path_factory.mktemp("pairs")
    chosen = {name: CASES[name] for name in request.param}
    for n in range(2):
        noise = torch.randint(0, 256, (37, 50 + n, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        Image.fromarray(noise.numpy()).resize((41, 30)).save(folder / f"{n}.png")
    ours, cases = {}, {}
    for number, (name, case) in enumerate(chosen.items()):
        loaded = build(case, folder / f"parts{number}")
        write(loaded, case["to"], folder / name, layout=case.get("layout"))
        images = [str(folder / f"{n}.png") for n in range(case.get("images", 1))]
        ours[name] = expected(loaded, case, images)
        cases[name] = {
            "folder": str(folder / name),
            "dtype": str(case.get("dtype", torch.float32)).removeprefix("torch."),
            "messages": messages(case.get("turns", [("What is this?", None)])),
            "images": images,
            "pixels": ours[name]["pixels"],
            "generate": {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": None},
        }
    torch.save(cases, folder / "cases.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "cases.pt"), str(folder / "results.pt")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []  # nothing of this package was imported
    return ours, torch.load(folder / "results.pt", weights_only=False), folder


def test_transformers_alone_computes_and_answers_the_same(compared):
    for name in compared[0]:
        check_same(name, compared[0][name], compared[1][name])


def check_same(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    dtype = CASES[name].get("dtype", torch.float32)
    kinds = {"llava": "LlavaForConditionalGeneration", "idefics3": "Idefics3ForConditionalGeneration"}
    assert theirs["class"] == kinds[CASES[name]["to"]], name
    places = ours["encoded"].image_mask
    assert int(places.sum()) > 0
    assert theirs["ids"] == torch.where(places, theirs["image_token_id"], ours["encoded"].input_ids).tolist(), name
    torch.testing.assert_close(theirs["pixels"], ours["pixels"].float(), atol=1e-5, rtol=1e-5)
    assert theirs["logits"].dtype == dtype
    assert ours["logits"].std() > 0.1
    found = theirs["logits"][:, : ours["logits"].shape[-1]]
    tolerance: dict[str, Any] = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found, ours["logits"], **tolerance, msg=lambda found: f"{name}: {found}")
    assert theirs["greedy"] == ours["greedy"], name
    tokenizer = ours["loaded"].conversation.tokenizer
    end = tokenizer.tokenizer.convert_tokens_to_ids(ours["loaded"].conversation.training_template.end)
    assert end in theirs["stops"], name


def test_the_answers_that_were_compared_are_not_all_alike(compared):
    answers = [tuple(ours["greedy"]) for ours in compared[0].values()]
    assert len(set(answers)) > len(answers) * 2 / 3
    assert sum(len(set(answer)) > 1 for answer in answers) > len(answers) / 4


def test_the_files_have_the_names_that_runtimes_read_and_the_whole_tower(compared):
    ours, _, folder = compared
    if "llava, clip, float64" not in ours:
        pytest.skip("of the main cases")
    names = load_file(folder / "llava, clip, float64" / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names  # a block that we do not keep
    source = load_file(next(folder.glob("parts0/tower/*.safetensors")))
    own = "vision_model.encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(names[f"vision_tower.{own}"].float(), source[own])
    names = load_file(folder / "idefics3, tied head" / "model.safetensors")
    assert {name.split(".")[1] for name in names} == {"vision_model", "connector", "text_model"}


def test_the_card_says_which_projector_was_written(compared):
    ours, _, folder = compared
    said = {name: " ".join((folder / name / "README.md").read_text().split()) for name in ours}
    assert all(str(folder) not in card for card in said.values())
    if "llava, clip, float64" not in ours:
        return
    assert "its activation is `linear`" in said["llava, clip, float64"]
    assert "the first makes x and -x of every feature" in said["llava, siglip, gelu"]
    assert "Two layers with GELU, as they were trained" in said["llava, siglip, mlp, float64"]
    assert "One matrix without bias" in said["idefics3, float64"]
    config = json.loads((folder / "llava, siglip, gelu" / "config.json").read_text())
    assert config["projector_hidden_act"] == "gelu"

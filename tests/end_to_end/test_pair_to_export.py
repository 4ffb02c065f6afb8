"""A pair from `configs/pairs/`, with small random weights: both stages, an answer, and what it promises to leave as."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.cli import main
from minigpt4.config import shipped
from tests.conformance.tiny import write_llm
from tests.towers import write_tower

pytestmark = pytest.mark.long

SMALL = [
    *("run.total_steps=2", "run.global_batch_size=4", "run.batch_size_per_rank=2", "run.warmup_steps=1"),
    *("run.num_workers=0", "run.device=cpu"),
    *("model.vision_encoder.dtype=float32", "model.language_model.dtype=float32"),
]


def write_shard(file: Path) -> None:
    """Sixteen images with captions, as img2dataset writes them."""
    with tarfile.open(file, "w") as tar:
        for n in range(16):
            image = io.BytesIO()
            Image.new("RGB", (40, 30), (n * 15, 100, 200 - n * 10)).save(image, "JPEG")
            for name, content in ((f"{n:04d}.jpg", image.getvalue()), (f"{n:04d}.txt", f"picture {n}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_a_copied_pair_is_trained_in_two_stages_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tower("siglip", tmp_path / "weights" / "siglip2-base-patch16-224")
    write_llm("qwen3", tmp_path / "weights" / "Qwen3-0.6B")
    write_shard(tmp_path / "shard.tar")
    Image.new("RGB", (40, 30), (200, 10, 20)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"image": "a.png", "conversations": turns})] * 4))
    data = {1: "datasets.train.captions.urls=[shard.tar]", 2: "datasets.train.conversations.path=rows.jsonl"}
    for stage, option in data.items():
        config = shipped("configs") / "pairs" / f"siglip2_qwen3_stage{stage}.yaml"
        assert main(["train", "--cfg-path", str(config), "--options", option, *SMALL]) == 0
    checkpoint = "output/pairs/siglip2_qwen3_stage2/checkpoints/latest"
    manifest = json.loads((tmp_path / checkpoint / "manifest.json").read_text())
    assert (manifest["stage"], manifest["template"]) == (2, "chatml")
    asked = ["--image", "a.png", "--question", "What?", "--options", "chat.max_new_tokens=5"]
    assert main(["chat", "--cfg-path", checkpoint, *asked]) == 0
    for to, file in (("llava", "model.safetensors"), ("mmproj", "mmproj.gguf")):
        assert main(["export", checkpoint, "--to", to, "--out", f"out-{to}"]) == 0
        assert (tmp_path / f"out-{to}" / file).is_file()
    capsys.readouterr()
    assert main(["export", checkpoint, "--to", "idefics3", "--out", "out"]) == 1
    assert "use --to prompt-embeds or mmproj or llava, or keep the checkpoint" in capsys.readouterr().err

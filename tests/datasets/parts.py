"""Real files and a small real pipeline for the tests of data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.datasets.source import Example, Item
from minigpt4.datasets.web_pairs import WebPairs
from minigpt4.processors.image import ImageProcessor, ImageSpec

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
SPEC = ImageSpec(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def image_bytes(number: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (number * 7 % 256, number * 31 % 256, number * 53 % 256)).save(buffer, format)
    return buffer.getvalue()


def write_shards(folder: Path, shards: int, each: int) -> list[str]:
    """Write shards as img2dataset does, every sample with its own caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        samples = []
        for place in range(each):
            number = shard * each + place
            caption = json.dumps({"caption": f"caption {number}", "status": "success"}).encode()
            samples.append({"__key__": f"{number:09d}", "jpg": image_bytes(number), "json": caption})
        write_shard(folder / f"{shard:05d}.tar", samples)
    return [str(folder / f"{{00000..{shards - 1:05d}}}.tar")]


def write_shard(file: Path, samples: list[dict[str, Any]]) -> Path:
    with wds.TarWriter(str(file), encoder=False, mtime=0, user="u", group="g") as writer:
        for sample in samples:
            writer.write(sample)
    return file


def web_pairs(urls: list[str], name: str = "web", **settings: Any) -> WebPairs:
    return WebPairs.from_config(WebPairs.Config(urls=urls, **settings), name=name)


def write_conversations(folder: Path, rows: int) -> Path:
    """Write a JSONL file of rows with images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        (folder / "images" / f"{number}.png").write_bytes(image_bytes(number, "PNG"))
        lines.append(json.dumps({"image": f"images/{number}.png", "caption": f"row {number}"}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def write_prompts(folder: Path) -> str:
    file = folder / "prompts.txt"
    lines = [f"<Img><ImageHere></Img> Describe this image, wording {n}." for n in range(4)]
    file.write_text("\n".join([*lines, "", ""]))
    return str(file)


def answers(items: list[Item]) -> list[str]:
    """Return the first answer of each example, the cause of each error."""
    return [str(i.dialogue.turns[0].answer) if isinstance(i, Example) else f"error: {i.cause}" for i in items]


def encoder(**settings: Any) -> ConversationEncoder:
    tokenizer = TextTokenizer.from_path(REFERENCE / "tokenizer.model")
    return ConversationEncoder(tokenizer, 4, ConversationConfig(**settings))


def processor() -> ImageProcessor:
    return ImageProcessor.from_config(ImageProcessor.Config(), SPEC)

"""Images per second that one process reads from shards: `python benchmarks/loader.py`, one JSON line per image size.

Three readers take the same JPEG shards in alternation, on one thread, and the medians are compared:

- `ours`: the training loader without workers, from shuffled shards to batches, texts tokenised;
- `published`: the way of the published code, which tokenises in the model: `webdataset` with a shuffle buffer, PIL,
  torchvision's resize, `ToTensor` and `Normalize`;
- `pillow`: decoding and resizing alone, from memory: no loader that uses Pillow can be faster.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torchvision import transforms

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rehearsal_files import write_all
from minigpt4.config.parts import ImageProcessorConfig, WebPairsConfig
from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.datasets.loader import StreamPlan, build_loader
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.web_pairs import WebPairs
from minigpt4.processors.image import ImageProcessor, ImageSpec

SPEC = ImageSpec(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 16
BUFFER = 64
"""Samples in the shuffle buffer."""


def main() -> None:
    """Measure, and print the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["640x480", "224x224"], help="of the JPEG files")
    parser.add_argument("--images", type=int, default=256, help="per measurement, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        llm = write_all(Path(name) / "files", only=["vicuna_7b"])["vicuna_7b"]
        for size in arguments.sizes:
            width, height = map(int, size.split("x"))
            content = [jpeg(number, width, height) for number in range(arguments.images)]
            shard = Path(name) / f"{size}.tar"
            with wds.TarWriter(str(shard), encoder=False) as writer:
                for number, picture in enumerate(content):
                    text = f"a picture with the number {number}".encode()
                    writer.write({"__key__": f"{number:06d}", "jpg": picture, "txt": text})
            readers: dict[str, Callable[[], Any]] = {
                "ours": ours(shard, llm, arguments.images),
                "published": published(shard, arguments.images),
                "pillow": partial(resize_all, content),
            }
            print(json.dumps({"size": size, **compare(readers, arguments.images, arguments.rounds)}), flush=True)


def compare(readers: dict[str, Callable[[], Any]], images: int, rounds: int) -> dict[str, float]:
    """Return images per second of each reader, and the median of the ratios of ours to the others."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            started = time.process_time()
            read()
            if number:  # the first round does not count
                seconds[name].append(time.process_time() - started)
    found = {name: round(images / statistics.median(each)) for name, each in seconds.items()}
    ratios = {
        f"ours_to_{name}": round(statistics.median(a / b for a, b in zip(each, seconds["ours"], strict=True)), 2)
        for name, each in seconds.items()
        if name != "ours"
    }
    return {**found, **ratios}


def jpeg(number: int, width: int, height: int) -> bytes:
    """Return a JPEG file of soft blobs with some noise: about as many bytes as a photograph has."""
    draw = np.random.default_rng(number)
    blobs = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    picture = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(picture + draw.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def resize_all(content: list[bytes]) -> None:
    """Decode files and resize them."""
    for file in content:
        Image.open(io.BytesIO(file)).convert("RGB").resize((SPEC.width, SPEC.height), Image.Resampling.BICUBIC)


def ours(shard: Path, llm: Path, images: int) -> Callable[[], Any]:
    """Return a function that reads the shard once with the training loader."""
    tokenizer = TextTokenizer.from_path(llm)
    encoder = ConversationEncoder(tokenizer, 32, ConversationConfig())
    source = WebPairs.from_config(WebPairsConfig(urls=[str(shard)], shuffle_buffer=BUFFER), name="pairs")
    processor = ImageProcessor(ImageProcessorConfig(), SPEC)
    plan = StreamPlan(seed=0, batch_size=BATCH, pad_id=tokenizer.filler_id)

    def read() -> list[torch.Size]:
        batches: Iterator[Any] = iter(build_loader(Mixture({"pairs": source}), encoder, processor, plan))
        return [batch.pixel_values.shape for batch in islice(batches, images // BATCH)]

    return read


def published(shard: Path, images: int) -> Callable[[], Any]:
    """Return a function that reads the shard once in the way of the published code."""
    to_tensor = transforms.Compose(
        [
            transforms.Resize((SPEC.height, SPEC.width), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )

    def read() -> list[torch.Size]:
        data = (
            wds.WebDataset(str(shard), shardshuffle=False)
            .shuffle(BUFFER)
            .decode("pilrgb")
            .to_tuple("jpg", "txt")
            .map_tuple(to_tensor, str)
            .batched(BATCH)
        )
        return [pixels.shape for pixels, _ in islice(data, images // BATCH)]

    return read


if __name__ == "__main__":
    main()

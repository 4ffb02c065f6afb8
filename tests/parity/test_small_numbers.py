"""Published token ids, captions, processors and learning rates."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.config.sections import RunConfig
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.models.vision import CLIP_MEAN, CLIP_STD
from minigpt4.processors.image import ImageProcessor, ImageSpec
from minigpt4.processors.text import BlipCaption
from minigpt4.runners.schedule import learning_rate
from tests.parity.conftest import META, REFERENCE, TOLERANCE, reference


@pytest.mark.parametrize(("text", "ids"), META.get("tokenizer", {}).items())
def test_token_ids(text, ids, tokenizer):
    assert tokenizer.tokenize([(text, True)]) == ids


@pytest.mark.parametrize("caption", META.get("captions", []), ids=lambda c: c["raw"][:20])
def test_captions(caption):
    assert BlipCaption.from_config(BlipCaption.Config())(caption["raw"]) == caption["processed"]


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_image_processor(kind):
    numbers = reference("processor")
    name = next(key for key in numbers if key.startswith(f"blip2_image_{kind}_"))
    side = numbers[name].shape[-1]
    processor = ImageProcessor.from_config(ImageProcessor.Config(), ImageSpec(side, side, CLIP_MEAN, CLIP_STD))
    from_array = Image.fromarray(np.asarray(numbers["input"]))
    for source in (from_array, REFERENCE / "processor_input.png"):
        torch.testing.assert_close(processor(source), numbers[name], **TOLERANCE)


@pytest.mark.parametrize("stage", META.get("lr", {}))
def test_published_learning_rates(stage):
    args = META["lr"][stage]["args"]
    run = RunConfig(
        output_dir="unused",
        total_steps=args["max_epoch"] * args["iters_per_epoch"],
        steps_per_epoch=args["iters_per_epoch"],
        warmup_steps=args["warmup_steps"],
        learning_rate=args["init_lr"],
        min_learning_rate=args["min_lr"],
        warmup_start_learning_rate=args["warmup_start_lr"],
    )
    for step, value in META["lr"][stage]["values"].items():
        assert learning_rate(int(step), run, "published") == pytest.approx(value, rel=1e-9), step


SEGMENTS = {
    "###Human: <Img>": "835 29950 7889 29901 529 25518 29958",
    "</Img> Describe this image in detail. ###Assistant: ": (
        "1533 25518 29958 20355 915 445 1967 297 9493 29889 835 7900 22137 29901 29871"
    ),
    "</Img> Take a look at this image and describe what you notice. ###Assistant: ": (
        "1533 25518 29958 11190 263 1106 472 445 1967 322 8453 825 366 8369 29889 835 7900 22137 29901 29871"
    ),
    "</Img> Please provide a detailed description of the picture. ###Assistant: ": (
        "1533 25518 29958 3529 3867 263 13173 6139 310 278 7623 29889 835 7900 22137 29901 29871"
    ),
    "</Img> Could you describe the contents of this image for me? ###Assistant: ": (
        "1533 25518 29958 6527 366 8453 278 8118 310 445 1967 363 592 29973 835 7900 22137 29901 29871"
    ),
    "The image shows a dog.###": "450 1967 3697 263 11203 29889 2277 29937",
    "a dog on a couch\n": "263 11203 373 263 274 3222 13",
    "[INST] <Img>": "518 25580 29962 529 25518 29958",
    "</s>": "2",
}


@pytest.mark.skipif(
    "MINIGPT4_LLAMA_TOKENIZER" not in os.environ,
    reason="MINIGPT4_LLAMA_TOKENIZER names no folder with the real LLaMA tokenizer.model",
)
@pytest.mark.parametrize(("text", "ids"), SEGMENTS.items())
def test_ids_of_the_real_llama_vocabulary(text, ids):
    folder = Path(os.environ["MINIGPT4_LLAMA_TOKENIZER"])
    tokenizer = TextTokenizer.from_path(folder if folder.suffix == ".model" else folder / "tokenizer.model")
    assert tokenizer.tokenize([(text, True)]) == [int(i) for i in ids.split()]

"""Ask this model about images; needs only transformers, torch and Pillow.

    python example.py --image photo.jpg --question "What is this?"

`prompt_format.json` in the same folder has the fixed text around questions, answers and images. The prompt is tokenised
in segments as in training: the text between two images is one segment, an answer is a segment of its own, and special
tokens are recognised only in the fixed text.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

HERE = Path(__file__).resolve().parent
MARK = "<ImageHere>"
"""The place of an image in a question; without it all images come before the first question."""
WHITE = (255, 255, 255)


class Answerer:
    """The model, its tokenizer and its image processor."""

    def __init__(self, folder: Path = HERE, dtype: Any = "auto", device: str = "cpu") -> None:
        self.form: dict[str, Any] = json.loads((folder / "prompt_format.json").read_text(encoding="utf-8"))
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().to(device)
        # transformers has one epsilon for all norms of the image encoder; this norm was trained with another.
        self.model.vision_model.post_layernorm.eps = self.form["post_layernorm_eps"]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def pixel_values(self, images: Sequence[Any]) -> torch.Tensor:
        """Return (images, 3, H, W) for paths or PIL images."""
        fitted = [self._fit(image if isinstance(image, Image.Image) else Image.open(image)) for image in images]
        return self.image_processor(fitted, return_tensors="pt").pixel_values

    def prompt_ids(self, turns: Sequence[tuple[str, str | None]], num_images: int = 1) -> list[int]:
        """Return the token ids of a conversation: (question, answer) pairs, the last answer None."""
        form, marks = self.form, sum(question.count(MARK) for question, _ in turns)
        if marks not in (0, num_images):
            raise ValueError(f"the questions mention {marks} image(s), but there are {num_images}")
        if form["isolate_turns"] and len(turns) > 1:  # every question was trained alone, with all images
            question, answer = turns[-1]
            marks = num_images if question.count(MARK) == num_images else 0
            turns = [(question if marks else question.replace(MARK, "").strip(), answer)]
        if marks == 0 and num_images:
            words = f" {turns[0][0]}" if turns[0][0] else ""
            turns = [(MARK * num_images + words, turns[0][1]), *turns[1:]]
        ids: list[int] = list(form["bos"])
        pieces: list[tuple[str, bool]] = [(form["opening"], True)]
        for number, (question, answer) in enumerate(turns):
            before, after = form["question" if number == 0 else "next_question"]
            pieces.append((before, True))
            *imaged, rest = (question.strip() if "user" in form["stripped"] else question).split(MARK)
            for text in imaged:
                pieces += [(text, False), (form["image"][0], True)]
                ids += self._encode(pieces) + [form["image_token_id"]] * form["num_query_tokens"]
                pieces = [(form["image"][1], True)]
            pieces += [(rest, False), (after, True)]
            if answer is None:
                break
            if form["answers_apart"]:
                answer = form["before_answer"] + (answer.strip() if "assistant" in form["stripped"] else answer)
                ids += self._encode(pieces) + self._encode([(answer, False), (form["end"], True)])
                pieces = []
            else:
                pieces += [(answer, False), (form["end"], True)]
        return ids + self._encode(pieces)

    @torch.inference_mode()
    def generate(self, images: Sequence[Any], turns: Sequence[tuple[str, str | None]], **settings: Any) -> list[int]:
        """Return the ids of the answer to the last question, greedy unless `settings` for `generate` say otherwise."""
        ids = torch.tensor([self.prompt_ids(turns, len(images))], device=self.model.device)
        defaults: dict[str, Any] = {
            "max_new_tokens": self.form["max_new_tokens"],
            "do_sample": False,
            "eos_token_id": self.form["eos_token_ids"] or None,
            "pad_token_id": 0,  # a single row is never padded, but generate warns without an id
            "suppress_tokens": [self.form["image_token_id"]],
        }
        if self.form["end"]:
            defaults |= {"stop_strings": [self.form["end"]], "tokenizer": self.tokenizer}
        output = self.model.generate(
            pixel_values=self.pixel_values(images).to(self.model.device),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **(defaults | settings),
        )
        return output[0, ids.shape[1] :].tolist()

    def answer(self, images: Sequence[Any], turns: Sequence[tuple[str, str | None]], **settings: Any) -> str:
        """Return the text of the answer to the last question."""
        ids = self.generate(images, turns, **settings)
        if ids and ids[-1] in self.form["eos_token_ids"]:
            ids = ids[:-1]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False))
        end = self.form["end"]
        return (text.partition(end)[0] if end else text).strip()

    def _encode(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Return the ids of pieces of text, joined; a piece is fixed text of the format (True) or content (False)."""
        specials = re.compile("|".join(map(re.escape, self.form["special_tokens"])) or r"(?!)")
        text, spans, start = "".join(part for part, _ in pieces), [], 0
        for part, is_fixed in pieces:
            spans += [(start + m.start(), start + m.end()) for m in specials.finditer(part) if is_fixed]
            start += len(part)
        ids: list[int] = []
        done = 0
        for start, end in spans:
            ids += [*self._plain(text[done:start]), self.tokenizer.convert_tokens_to_ids(text[start:end])]
            done = end
        return ids + self._plain(text[done:])

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids) if text else []

    def _fit(self, image: Image.Image) -> Image.Image:
        """Return an RGB image, upright, on white, shrunk and letterboxed as in training."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", image.size, WHITE)
            image.paste(layer, mask=layer.getchannel("A"))
        image, side = image.convert("RGB"), self.form["max_side"]
        if 0 < side < max(image.size):
            image = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
        if self.form["resize"] != "letterbox":
            return image  # the image processor stretches it
        height, width = self.image_processor.size["height"], self.image_processor.size["width"]
        scale = min(width / image.width, height / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = Image.new("RGB", (width, height), WHITE)
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
        return canvas


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--question", default="", metavar="TEXT")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    answerer = Answerer(dtype=given.dtype, device=given.device)
    print(answerer.answer(given.image, [(given.question, None)]))


if __name__ == "__main__":
    main()

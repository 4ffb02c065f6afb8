"""What an exported pair computes and answers through its own processor; run in a process without this package."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    model: Any = AutoModelForImageTextToText.from_pretrained(case["folder"], dtype=dtype).eval()
    processor: Any = AutoProcessor.from_pretrained(case["folder"], backend="pil")
    pictures = iter([Image.open(path).convert("RGB") for path in case["images"]])
    messages = []
    for role, parts in case["messages"]:
        content = [
            {"type": "image", "image": next(pictures)} if p is None else {"type": "text", "text": p} for p in parts
        ]
        messages.append({"role": role, "content": content})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = inputs["pixel_values"]
    given = case["pixels"].reshape(pixels.shape)  # ours, in the precision of the case
    with torch.no_grad():
        logits = model(**{**inputs, "pixel_values": given}).logits[0]
        answer = model.generate(**{**inputs, "pixel_values": pixels.to(dtype)}, do_sample=False, **case["generate"])
    return {
        "class": type(model).__name__,
        "ids": inputs["input_ids"][0].tolist(),
        "pixels": pixels.reshape(case["pixels"].shape),
        "logits": logits,
        "greedy": answer[0, inputs["input_ids"].shape[1] :].tolist(),
        "image_token_id": model.config.image_token_id,
        "stops": model.generation_config.eos_token_id,
    }


def main(cases_file: str, results_file: str) -> None:
    cases = torch.load(cases_file)
    torch.save({name: run(case) for name, case in cases.items()}, results_file)
    print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "minigpt4")))


if __name__ == "__main__":
    main(*sys.argv[1:])

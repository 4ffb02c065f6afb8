"""What an exported folder computes and answers; run in a separate process, without this package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("example", folder / "example.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    answerer = example.Answerer(folder, dtype=case["dtype"])
    turns = [tuple(turn) for turn in case["turns"]]
    ids = torch.tensor([answerer.prompt_ids(turns, len(case["images"]))])
    pixels = case["pixels"]
    with torch.no_grad():
        logits = answerer.model(pixel_values=pixels, input_ids=ids).logits[0]
    long = {"eos_token_id": None, "stop_strings": None, "min_new_tokens": 12, "max_new_tokens": 12}
    return {
        "class": type(answerer.model).__name__,
        "ids": ids[0].tolist(),
        "logits": logits,
        "pixels": answerer.pixel_values(case["images"]),
        "greedy": answerer.generate(case["images"], turns, **long),
        "answer": answerer.answer(case["images"], turns),
        "named": dict(answerer.model.named_parameters()),
    }


def main(cases_file: str, results_file: str) -> None:
    cases = torch.load(cases_file)
    results = {name: run(Path(case["folder"]), case) for name, case in cases.items()}
    torch.save(results, results_file)
    print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "minigpt4")))


if __name__ == "__main__":
    main(*sys.argv[1:])

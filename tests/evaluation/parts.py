"""Questions about tiny images, in a file, and the config that asks a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def write_rows(folder: Path, images: int = 5, bad: bool = False) -> Path:
    """Write two questions about each of some noisy images, one of which cannot be read if `bad`."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(images):
        Image.effect_noise((30 + n, 20), 50 + 30 * n).convert("RGB").save(folder / f"{n}.png")
        for kind in ("what", "where"):
            rows.append(
                {"id": f"{n}{kind}", "image": f"{n}.png", "question": f"{kind} is é?", "answer": "x", "kind": kind}
            )
    if bad:
        (folder / "1.png").write_text("words")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def values(chat_values: dict[str, Any], file: Path, output: Path | None, **others: Any) -> dict[str, Any]:
    """Return the values of a config that asks the rows of `file`."""
    evaluation = {
        "tasks": {"mine": {"type": "rows", "path": str(file), **others.pop("task", {})}},
        "batch_size": 3,
        "max_new_tokens": 4,
        "output": str(output or ""),
        "device": "cpu",
        **others,
    }
    return {**chat_values, "evaluation": evaluation}

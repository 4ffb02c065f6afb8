"""Answer `request.json` with transformers alone; a server such as vLLM answers the same request.

    python example.py

The language model is the folder `language_model` next to this file, if there is one: then it was trained. Otherwise it
is the original one, whose path is `model` in the request; another path can be given with `--model`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


def answer(request: dict[str, Any], model: Any, tokenizer: Any) -> str:
    """Return the text of the answer to a request."""
    embeds = torch.load(io.BytesIO(base64.b64decode(request["prompt_embeds"])), weights_only=True).to(model.dtype)
    settings: dict[str, Any] = {"eos_token_id": request["stop_token_ids"] or None, "pad_token_id": 0}
    if request["stop"]:
        settings |= {"stop_strings": request["stop"], "tokenizer": tokenizer}
    if request["temperature"] > 0:
        settings |= {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"]}
        torch.manual_seed(request["seed"])
    else:
        settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    ids = model.generate(
        inputs_embeds=embeds.unsqueeze(0), attention_mask=mask, max_new_tokens=request["max_tokens"], **settings
    )[0].tolist()
    text = str(tokenizer.decode([i for i in ids if i not in request["stop_token_ids"]]))
    for stop in request["stop"]:
        text = text.partition(stop)[0]
    return text.strip()


def main() -> None:
    """Print the answer to the request next to this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    request = json.loads((HERE / "request.json").read_text(encoding="utf-8"))
    own = HERE / "language_model"
    parser.add_argument("--model", default=str(own) if own.is_dir() else request["model"], metavar="FOLDER")
    folder = parser.parse_args().model
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto").eval()
    print(answer(request, model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)))


if __name__ == "__main__":
    main()

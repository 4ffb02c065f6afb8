"""Prompts with images as embeds, for a stock server of the untouched language model.

Input: a loaded model, images, a question. Output: a folder with the tensor `prompt_embeds` as vLLM's
`--enable-prompt-embeds` takes it, and a ready request for `/v1/completions`. The server needs no part of this package.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ContextLengthError, ExportError
from minigpt4.exports.ends import end_token_ids
from minigpt4.models.freezing import part_of
from minigpt4.models.splice import splice
from minigpt4.processors.image import ImageSource

TENSOR = "prompt_embeds.pt"
REQUEST = "request.json"


def export_prompt_embeds(loaded: LoadedModel, out: Path, images: Sequence[ImageSource], question: str) -> None:
    """Write the folder `out`: the tensor, and the request that holds it.

    Raises:
        ExportError: the language model is not the untouched one, or `out` exists or cannot be written.
        ImageError, ConversationError, ContextLengthError: the prompt cannot be made.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; name a new folder")
    embeds = prompt_embeds(loaded, images, question)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        torch.save(embeds, partial / TENSOR)
        request = completion_request(loaded, embeds)
        (partial / REQUEST).write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        partial.replace(out)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
        raise ExportError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def prompt_embeds(loaded: LoadedModel, images: Sequence[ImageSource], question: str) -> Tensor:
    """Return the embeds (T, Dl) of a question about images, on the CPU, in the language model's precision.

    Raises:
        ExportError: the language model has learnt something, so that a server of the untouched one would answer
            otherwise.
        ImageError, ConversationError, ContextLengthError: the prompt cannot be made.
    """
    learnt = sorted({part_of(name) for name in loaded.model.learnt_names()} & {"language_model", "lora"})
    if learnt:
        raise ExportError(
            f"this model's {learnt[0]} was trained, so a server of the untouched language model would answer "
            "otherwise: use --to huggingface, or chat with the checkpoint"
        )
    model, limit = loaded.model, loaded.config.chat.max_new_tokens
    prompt = loaded.encoder.encode_prompt(Dialogue((Turn(question),)), num_images=len(images))
    length, context = len(prompt.input_ids), model.language_model.context_length
    if length + limit > context:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the answer may have {limit}, but the language model reads {context}: "
            "lower chat.max_new_tokens"
        )
    pixels = [loaded.image_processor(image, name=f"image {n}") for n, image in enumerate(images, start=1)]
    image_embeds = model.encode_images(torch.stack(pixels).to(model.device)) if pixels else None
    tokens = model.language_model.embed(prompt.input_ids.to(model.device).unsqueeze(0))
    return splice(tokens, image_embeds, prompt.image_mask.to(model.device).unsqueeze(0))[0].cpu()


def completion_request(loaded: LoadedModel, embeds: Tensor) -> dict[str, Any]:
    """Return the body of `POST /v1/completions` for vLLM (its documentation, "Prompt Embedding Inputs").

    `model` is the path of the language model, which `vllm serve PATH` takes as its name.
    """
    buffer = io.BytesIO()
    torch.save(embeds, buffer)
    chat = loaded.config.chat
    return {
        "model": str(loaded.config.model.language_model.config.path),
        "prompt": "",
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "max_tokens": chat.max_new_tokens,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "seed": chat.seed,
        **stops(loaded),
    }


def stops(loaded: LoadedModel) -> dict[str, Any]:
    """Return `stop` and `stop_token_ids`: an end mark that is a special token does not show in a server's text."""
    encoder = loaded.encoder
    end, ids = encoder.training_template.end, end_token_ids(loaded)
    if end in encoder.tokenizer.special_tokens:
        return {"stop": [], "stop_token_ids": sorted({*ids, *encoder.end_ids})}
    return {"stop": [end] if end else [], "stop_token_ids": ids}

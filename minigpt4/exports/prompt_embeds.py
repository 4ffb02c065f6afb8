"""Prompts with images as embeds, for any server of the language model.

Input: a loaded model, images, a question. Output: a folder with the tensor `prompt_embeds`, for vLLM's
`--enable-prompt-embeds`, a complete request for `/v1/completions`, and `example.py`, which answers it with transformers
alone. If the language model was trained, the folder also contains it. The server does not need this package.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.assets import resolve
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ExportError
from minigpt4.exports.language_model import export_language_model, trained_parts
from minigpt4.exports.writing import write_complete
from minigpt4.processors.image import ImageSource

TENSOR = "prompt_embeds.pt"
REQUEST = "request.json"
LANGUAGE_MODEL = "language_model"


def export_prompt_embeds(loaded: LoadedModel, out: Path, images: Sequence[ImageSource], question: str) -> None:
    """Write the folder `out`.

    Raises:
        ExportError: `out` exists or cannot be written.
        ImageError, ConversationError, ContextLengthError: the prompt cannot be built.
    """
    embeds = prompt_embeds(loaded, images, question)
    is_trained = bool(trained_parts(loaded))
    request = completion_request(loaded, embeds, str(out / LANGUAGE_MODEL) if is_trained else "")
    example = resources.files(__package__).joinpath("prompt_embeds_example.py").read_text(encoding="utf-8")
    with write_complete(out) as partial:
        partial.mkdir()
        torch.save(embeds, partial / TENSOR)
        (partial / REQUEST).write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        (partial / "example.py").write_text(example, encoding="utf-8")
        if is_trained:
            export_language_model(loaded, partial / LANGUAGE_MODEL)


def prompt_embeds(loaded: LoadedModel, images: Sequence[ImageSource], question: str) -> Tensor:
    """Return the embeds (T, Dl) of a question about images, on the CPU, in the language model's precision.

    Raises:
        ImageError, ConversationError, ContextLengthError: the prompt cannot be built.
    """
    engine = Engine(loaded)
    prompt = Prompt(Dialogue((Turn(question),)), engine.query_features(images))
    return engine.embeds(prompt, loaded.config.chat.max_new_tokens).cpu()


def completion_request(loaded: LoadedModel, embeds: Tensor, language_model: str = "") -> dict[str, Any]:
    """Return the body of `POST /v1/completions` for vLLM (its documentation, "Prompt Embedding Inputs").

    Args:
        loaded: the model and what belongs to it.
        embeds: what `prompt_embeds` returns.
        language_model: the path of the language model, which is its name after `vllm serve PATH`; empty: the path in
            the config.

    Raises:
        ExportError: no path is given and the language model was trained, so the original one would answer differently.
    """
    trained = trained_parts(loaded)
    if trained and not language_model:
        raise ExportError(
            f"this model's {trained[0]} was trained, so the original language model would answer differently: write "
            "it with export_language_model, and give its folder as language_model"
        )
    buffer = io.BytesIO()
    torch.save(embeds, buffer)
    chat = loaded.config.chat
    return {
        "model": language_model or str(resolve(loaded.config.model.language_model.config.path)),
        "prompt": "",
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "max_tokens": chat.max_new_tokens,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "seed": chat.seed,
        **stops(loaded),
    }


def stops(loaded: LoadedModel) -> dict[str, Any]:
    """Return `stop` and `stop_token_ids`; an end mark that is a special token is not part of a server's text."""
    encoder = loaded.conversation
    end, ids = encoder.training_template.end, Engine(loaded).end_ids
    if end in encoder.tokenizer.special_tokens:
        return {"stop": [], "stop_token_ids": sorted({*ids, *encoder.end_ids})}
    return {"stop": [end] if end else [], "stop_token_ids": ids}

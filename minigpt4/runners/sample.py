"""A sample answer in the log of a run: the same question about the same image, at the start and at each validation.

Input: the model in training. Output: its greedy answer, as chat would give it.
"""

from __future__ import annotations

from accelerate import Accelerator

from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config import resolve_shipped
from minigpt4.config.sections import ChatConfig, RunConfig
from minigpt4.conversation.dialogue import Dialogue, Turn

MAX_NEW_TOKENS = 32
"""Longest sample answer in tokens."""


def sample_answer(loaded: LoadedModel, run: RunConfig, accelerator: Accelerator) -> str:
    """Return the answer to `run.sample_question` about `run.sample_image`, empty without an image.

    Every rank must call this, since a language model may be sharded over them. The model is left in eval mode.

    Raises:
        ImageError: the image cannot be read.
    """
    if not run.sample_image:
        return ""
    loaded.model.eval()
    engine = Engine(loaded)
    with accelerator.autocast():
        features = engine.query_features([resolve_shipped(run.sample_image)])
        prompt = Prompt(Dialogue((Turn(run.sample_question),)), features)
        (answer,) = engine.answer([prompt], ChatConfig(max_new_tokens=MAX_NEW_TOKENS))
    return " ".join(answer.split())

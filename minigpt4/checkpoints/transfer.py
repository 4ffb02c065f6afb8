"""A trained projection for another language model (VPGTrans, Zhang et al. 2023, section 4.2).

Input: a checkpoint, the language model that it was trained with, and a model with another one. Output: `llama_proj` of
that model: the old projection times the least-squares map from the old embedding table to the new one, over the words
that both vocabularies have. The image encoder and the resampler must be those of the checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.assets import resolve
from minigpt4.checkpoints.manifest import FROZEN_PARTS, Manifest, check_part, check_same, identify_part, known_part
from minigpt4.checkpoints.start import Start
from minigpt4.config.parts import LanguageModelConfig
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import CheckpointError
from minigpt4.models.closed_form import FOLDS, Moments, best_penalty, sum_of
from minigpt4.models.language_model import LanguageModel
from minigpt4.models.minigpt4 import MiniGPT4

LEAST_WORDS = 64
"""Shared words below which the two vocabularies have too little in common."""
PROJECTION = ("llama_proj.weight", "llama_proj.bias")
_LANGUAGE_MODEL = "language_model"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WordMap:
    """The least-squares map between two embedding tables.

    Attributes:
        weight: (Dl new, Dl old), float64.
        bias: (Dl new,), float64.
        words: number of shared words it was fitted on.
        r2: share of the variance of the new embeds that it explains in cross-validation.
    """

    weight: Tensor
    bias: Tensor
    words: int
    r2: float


def needs_transfer(manifest: Manifest, model: MiniGPT4) -> bool:
    """Whether a checkpoint was trained with another language model than that of `model`, or does not say with which."""
    theirs = manifest.parts.get(_LANGUAGE_MODEL)
    ours = identify_part(model.language_model, model.frozen_tensors(_LANGUAGE_MODEL, manifest.trained))
    return theirs is None or theirs.fingerprint != ours.fingerprint


@torch.no_grad()
def transferred(model: MiniGPT4, tokenizer: TextTokenizer, start: Start, trained_with: str) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint, `llama_proj` moved to the language model of `model`.

    Args:
        model: with the new language model; it is not changed.
        tokenizer: of the new language model.
        start: the checkpoint.
        trained_with: the language model that the checkpoint was trained with, as in `model.language_model.path`.

    Raises:
        CheckpointError: that is another language model, another part differs, the checkpoint trained tensors inside the
            language model, or the vocabularies share too few words.
        WeightsError: the language model cannot be loaded.
    """
    place, trained = str(start.place), start.manifest.trained
    inside = sorted(name for name in trained if name.startswith(f"{_LANGUAGE_MODEL}."))
    if inside:
        raise CheckpointError(
            f"{place}: trained {len(inside)} tensors inside its language model ({inside[0]}), which another one does "
            "not have; model.start.trained_with takes checkpoints that trained parts in front of it only"
        )
    for name in FROZEN_PARTS:
        if name != _LANGUAGE_MODEL:
            check_part(start.manifest, model, name, place)
    old = LanguageModel.from_config(LanguageModelConfig(path=trained_with, dtype="auto"))
    _check_old(start.manifest, old, place)
    found = word_map(old, TextTokenizer.from_path(resolve(trained_with)), model.language_model, tokenizer)
    tensors = start.read()
    weight, bias = (tensors[name].double() for name in PROJECTION)
    tensors[PROJECTION[0]] = (found.weight @ weight).float()
    tensors[PROJECTION[1]] = (found.weight @ bias + found.bias).float()
    _log.info(
        "%s: trained with the language model %s; llama_proj is moved to %s through the embeds of %d words that both "
        "have (cross-validated R² %.2f)",
        place,
        trained_with,
        model.language_model.source,
        found.words,
        found.r2,
    )
    return tensors


def word_map(
    old: LanguageModel, old_tokenizer: TextTokenizer, new: LanguageModel, new_tokenizer: TextTokenizer
) -> WordMap:
    """Return the affine least-squares map from the embeds of one language model to those of another.

    Raises:
        CheckpointError: they share fewer than `LEAST_WORDS` words.
    """
    old_words, new_words = old_tokenizer.words(old.vocab_size), new_tokenizer.words(new.vocab_size)
    shared = sorted(old_words.keys() & new_words.keys())
    if len(shared) < LEAST_WORDS:
        raise CheckpointError(
            f"the vocabularies of {old.source} and {new.source} share {len(shared)} words, too few to move a "
            f"projection from one to the other (at least {LEAST_WORDS}); train a new one"
        )
    x, y = (
        llm.embed(torch.tensor([words[word] for word in shared])).cpu()
        for llm, words in ((old, old_words), (new, new_words))
    )
    folds = [Moments(x.shape[1], y.shape[1]) for _ in range(FOLDS)]
    for number, fold in enumerate(folds):
        fold.add(x[number::FOLDS], y[number::FOLDS])
    penalty, errors = best_penalty(folds)
    every = sum_of(folds)
    weight, bias = every.solve(penalty)
    return WordMap(weight, bias, len(shared), 1 - float(errors.sum() / every.variances().sum()))


def _check_old(manifest: Manifest, old: LanguageModel, place: str) -> None:
    """Raise CheckpointError unless `old` is the language model of the checkpoint."""
    theirs = known_part(manifest, _LANGUAGE_MODEL, place)
    ours = identify_part(old, list(old.state_dict().items()), with_fingerprint=bool(theirs.fingerprint))
    check_same(_LANGUAGE_MODEL, theirs, ours, place)

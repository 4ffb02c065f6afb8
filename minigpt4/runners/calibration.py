"""What a new model computes from training data before its first step: statistics of features, and a start.

Input: the assembled model and the data sources. Output: the model, changed. Every rank computes the same from the same
first samples. A checkpoint holds the result, so a run that is resumed or starts from one computes nothing here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.datasets.loader import ImageReader
from minigpt4.datasets.source import Source
from minigpt4.errors import ConfigError
from minigpt4.models.closed_form import ClosedFormStart, start_in_closed_form
from minigpt4.processors.image import ImageProcessor
from minigpt4.runners.batches import first_batches

CALIBRATION_SAMPLES = 512
"""Training samples whose images a resampler's statistics are taken from."""
AT_ONCE = 64
"""Samples that are read, and images that are encoded, together."""
SHOWN_WORDS = 12
"""Content words that are named in the log."""
_log = logging.getLogger(__name__)


def calibrate(loaded: LoadedModel, sources: Mapping[str, Source]) -> None:
    """Set the statistics of the resampler, if it has any.

    Raises:
        ConfigError: none of the first training samples has an image.
    """
    if loaded.model.resampler.calibrated:
        pixels = calibration_images(loaded.conversation, loaded.image_processor, sources)
        loaded.model.calibrate(pixels.to(loaded.model.device))


def calibration_images(
    conversation: ConversationEncoder, processor: ImageProcessor, sources: Mapping[str, Source]
) -> Tensor:
    """Return the `pixel_values` (I, 3, H, W) of the first training samples.

    Raises:
        ConfigError: none of them has an image.
    """
    batches = first_batches(conversation, processor, sources, CALIBRATION_SAMPLES, AT_ONCE)
    pixels = [batch.pixel_values for batch in batches if batch.pixel_values is not None]
    if not pixels:
        raise ConfigError("model.resampler: none of the first training samples has an image to calibrate on")
    return torch.cat(pixels)


def start_projector(loaded: LoadedModel, sources: Mapping[str, Source], images: ImageReader) -> None:
    """Set `llama_proj` in closed form if `model.start.ridge` asks for it.

    Raises:
        ConfigError: none of the samples has exactly one image.
    """
    samples = loaded.config.model.start.ridge
    if samples:
        started = time.monotonic()
        found = closed_form_start(loaded, sources, images, samples)
        _report(found, samples, loaded, time.monotonic() - started)


def closed_form_start(
    loaded: LoadedModel, sources: Mapping[str, Source], images: ImageReader, samples: int
) -> ClosedFormStart:
    """Compute `llama_proj` in closed form from the first training samples with one image each.

    Args:
        loaded: the model on its device.
        sources: the training data.
        images: reads the images of the samples, or their cached features.
        samples: how many samples are read; their query features are held in memory, Q * Dq * 4 bytes each.

    Raises:
        ConfigError: none of the samples has exactly one image.
    """
    features: list[Tensor] = []
    texts: list[list[int]] = []
    for batch in first_batches(loaded.conversation, images, sources, samples, AT_ONCE):
        found = batch.query_features
        if batch.pixel_values is not None:
            with torch.no_grad():
                found = loaded.model.query_features(batch.pixel_values.to(loaded.model.device)).cpu()
        if found is None:
            continue
        place = 0
        rows = batch.supervised_positions // batch.input_ids.shape[1]
        for row, number in enumerate(batch.images_per_row.tolist()):
            if number == 1:  # with more, nothing says which of them a word is about
                features.append(found[place])
                texts.append(batch.targets[rows == row].tolist())
            place += number
    if not features:
        raise ConfigError(f"model.start.ridge: none of the first {samples} training samples has exactly one image")
    return start_in_closed_form(loaded.model, features, texts)


def _report(found: ClosedFormStart, wanted: int, loaded: LoadedModel, seconds: float) -> None:
    """Log what a closed-form start was made of."""
    if not found.words:
        _log.warning(
            "model.start.ridge: no word of the first %d texts can be predicted from the image features, so llama_proj "
            "keeps its random start; raise model.start.ridge, or check that images and texts belong together",
            wanted,
        )
        return
    decode = loaded.conversation.tokenizer.decode
    shown = [f"{decode([token]).strip()!r} {r2:.2f}" for token, r2 in list(found.words.items())[:SHOWN_WORDS]]
    more = f" and {len(found.words) - SHOWN_WORDS} more" if len(found.words) > SHOWN_WORDS else ""
    _log.info(
        "closed-form start, %.1f s: llama_proj from %d samples (%d of %d unused); %d words of their texts can be "
        "predicted from the images (cross-validated R²): %s%s; their embeds: R² %.2f with penalty %g",
        seconds,
        found.samples,
        wanted - found.samples,
        wanted,
        len(found.words),
        ", ".join(shown),
        more,
        found.r2,
        found.penalty,
    )

"""How long the rows of a run are: from its data where that is here, else the longest that the config allows.

Input: a config and its model on the meta device. Output: batches of a run, images without values. No image is decoded.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from minigpt4.assets import resolve
from minigpt4.batch import IGNORE, Batch, Sample
from minigpt4.config import Config
from minigpt4.config.sections import OWN_TEMPLATE
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn, images_first, read_prompts
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.datasets.collate import collate
from minigpt4.datasets.source import Example, Source
from minigpt4.errors import MiniGPT4Error
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.registry import TEMPLATES

MAX_SAMPLES = 512
"""Training samples whose text is read."""
BATCHES = 16
CHARACTERS_PER_TOKEN = 3
"""Of a prompt, where there is no tokenizer: those of the paper's stage 2 have 2.8 with LLaMA's."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Batches as a run has them.

    Attributes:
        typical: one of the usual length; its images have no values.
        widest: the longest one.
        positions: mean positions of a row, padding included.
        origin: where the lengths come from, for the reader.
        images: about how many images the training data has; None if it is not here.
    """

    typical: Batch
    widest: Batch
    positions: float
    origin: str
    images: int | None


def rows_of(config: Config, model: MiniGPT4) -> Rows:
    """Return batches of `run.batch_size_per_rank` rows as training would have them."""
    size = config.run.batch_size_per_rank
    encoder = _encoder(config, model)
    sources = _sources(config)
    samples = list(_read(config, model, encoder, sources)) if sources and encoder is not None else []
    images = sum(source.expected_images() or 0 for source in sources) if sources else None
    if not samples:
        longest = _longest(config, model, encoder)
        batch = collate([longest] * size, 0)
        origin = f"every row has {len(longest.input_ids)} positions, the longest that the config allows"
        return Rows(batch, batch, len(longest.input_ids), origin, images)
    # As many samples as a batch has, from the front of the data again if it is small.
    groups = [[samples[(n * size + i) % len(samples)] for i in range(size)] for n in range(BATCHES)]
    groups = groups[: max(1, math.ceil(len(samples) / size))]
    batches = sorted((collate(group, 0) for group in groups), key=lambda batch: batch.input_ids.shape[1])
    widths = [batch.input_ids.shape[1] for batch in batches]
    origin = f"rows as in the first {len(samples)} samples of the training data: {widths[0]} to {widths[-1]} positions"
    return Rows(batches[len(batches) // 2], batches[-1], sum(widths) / len(widths), origin, images)


def _encoder(config: Config, model: MiniGPT4) -> ConversationEncoder | None:
    try:
        tokenizer = TextTokenizer.from_path(resolve(config.model.language_model.config.path))
        return ConversationEncoder(tokenizer, model.num_query_tokens, config.conversation, config.compat)
    except MiniGPT4Error as error:
        _log.info("prompts are counted as 1 token for %d characters: %s", CHARACTERS_PER_TOKEN, error)
        return None


def _sources(config: Config) -> list[Source]:
    """Return the training data sets, none if one of them is not here."""
    try:
        return [part.build(name=name) for name, part in sorted(config.datasets.train.items())]
    except MiniGPT4Error as error:
        _log.info("the training data cannot be read, so its texts are not: %s", error)
        return []


def _read(config: Config, model: MiniGPT4, encoder: ConversationEncoder, sources: list[Source]) -> Iterator[Sample]:
    """Yield encoded samples of all data sets, in the shares of the mixture."""
    total = sum(source.weight for source in sources)
    wanted = min(MAX_SAMPLES, BATCHES * config.run.batch_size_per_rank)
    found: list[Sample] = []
    for source in sources:
        share = max(1, round(wanted * source.weight / total))
        for item in islice(source.in_order(), share):
            if not isinstance(item, Example):
                continue
            try:
                encoded = encoder.encode_dialogue(item.dialogue, num_images=len(item.images), sample_id=item.id)
            except MiniGPT4Error:
                continue
            found.append(_with_images(model, Sample(id=item.id, **vars(encoded)), len(item.images)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(config.run.seed))
    yield from (found[number] for number in order.tolist())


def _longest(config: Config, model: MiniGPT4, encoder: ConversationEncoder | None) -> Sample:
    """Return a sample of one image, the longest prompt and the longest answer."""
    settings = config.conversation
    prompt = max(_prompts(config), key=len)
    if encoder is not None:
        answer = "word " * settings.max_answer_tokens
        encoded = encoder.encode_dialogue(Dialogue((Turn(prompt, answer),)), num_images=1, sample_id="the longest row")
        return _with_images(model, Sample(id="longest", **vars(encoded)), 1)
    template = TEMPLATES.get("chatml" if settings.template == OWN_TEMPLATE else settings.template)
    asked = prompt if IMAGE_MARK in prompt else images_first(prompt, 1)
    text = template.render(Dialogue((Turn(asked),))).replace(IMAGE_MARK, "")
    before = 1 + math.ceil(len(text) / CHARACTERS_PER_TOKEN)
    length = before + model.num_query_tokens + settings.max_answer_tokens
    ids = torch.zeros(length, dtype=torch.long)
    labels = torch.full((length,), IGNORE)
    labels[-settings.max_answer_tokens :] = 0
    image_mask = torch.zeros(length, dtype=torch.bool)
    image_mask[1 : 1 + model.num_query_tokens] = True
    sample = Sample("longest", ids, labels, image_mask, torch.arange(length), torch.zeros_like(ids))
    return _with_images(model, sample, 1)


def _prompts(config: Config) -> list[str]:
    """Return the instructions of the data sets; captions alone have none."""
    found = [""]
    for part in config.datasets.train.values():
        try:
            found += read_prompts(getattr(part.config, "prompts", ""))
        except MiniGPT4Error as error:
            _log.info("%s", error)
    return found


def _with_images(model: MiniGPT4, sample: Sample, images: int) -> Sample:
    """Give a sample images without values."""
    spec = model.vision_encoder.image_spec
    sample.pixel_values = torch.empty(images, 3, spec.height, spec.width, device="meta") if images else None
    return sample


def from_cache(batch: Batch, model: MiniGPT4) -> Batch:
    """Return a batch with query features, without values, in place of its images."""
    if batch.pixel_values is None:
        return batch
    shape = (len(batch.pixel_values), model.num_query_tokens, model.resampler.feature_dim)
    features = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    return dataclasses.replace(batch, pixel_values=None, query_features=features)

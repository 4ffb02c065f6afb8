"""Processors of transformers that build our prompts: tokenizer with `<image>`, chat template and image processor.

Input: a loaded model. Output: a processor to save with an exported model, and whether the token ids that it builds are
those of `ConversationEncoder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AddedToken, DeepseekVLProcessor, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.errors import ConversationError
from minigpt4.exports.chat_template import chat_template
from minigpt4.exports.language_model import source_tokenizer

IMAGE_TOKEN = "<image>"
_ANSWER = "A red bird, I think."
_DIALOGUES: tuple[tuple[tuple[str, str | None], ...], ...] = (
    (("What is this?", None),),
    ((f"{IMAGE_MARK} Is it 1 or 2?\n\n\tTwo.", _ANSWER), ("É 🦜 <b>?", None)),
    ((f"Are {IMAGE_MARK} and {IMAGE_MARK} one?", "No."), ("Why not?", "Look.\nThey differ."), ("Sure?", None)),
)
"""Prompts of one to three turns that are compared; the first one has no mark, so its image comes first."""
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class TokenizerWithImage:
    """The language model's tokenizer with `<image>`.

    Attributes:
        tokenizer: freshly read; nothing else shares it.
        image_token_id: of `<image>`.
        added_rows: rows of the embedding that are repeated after the last one, so that `<image>` has one.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    added_rows: list[int]


def tokenizer_with_image(loaded: LoadedModel) -> TokenizerWithImage:
    """Add `<image>` to the tokenizer of the language model.

    A new row of the head repeats that of the unknown token (or the last one), which models do not generate: a row of
    zeros could have the largest logit if all others are negative. Two rows are new if the tokenizer has a padding token
    without a row, as in old Vicuna folders.
    """
    tokenizer, rows = source_tokenizer(loaded), loaded.model.language_model.vocab_size
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    unknown = tokenizer.unk_token_id
    repeated = rows - 1 if unknown is None or unknown >= rows else int(unknown)
    return TokenizerWithImage(tokenizer, token_id, [repeated] * (token_id + 1 - rows))


def llava_processor(loaded: LoadedModel, with_image: TokenizerWithImage) -> LlavaProcessor:
    """Return the processor of LLaVA: the image stretched to the tower's size, `<image>` repeated for each patch."""
    encoder: Any = loaded.model.vision_encoder
    return LlavaProcessor(
        CLIPImageProcessorPil(do_center_crop=False, crop_size=_size(loaded), size=_size(loaded), **_pixels(loaded)),
        with_image.tokenizer,
        patch_size=encoder.tower.config.patch_size,
        vision_feature_select_strategy=select_strategy(loaded),
        num_additional_image_tokens=num_class_tokens(loaded),
        chat_template=_chat_template(loaded, with_image.tokenizer),
    )


def idefics3_processor(loaded: LoadedModel, with_image: TokenizerWithImage) -> DeepseekVLProcessor:
    """Return a processor with the image processor of Idefics3, for one tile, and `<image>` repeated for each token.

    transformers' `Idefics3Processor` puts three marks around an image, which no other language model has as tokens. The
    processor of DeepSeek-VL repeats `<image>` and does nothing else.
    """
    side = {"longest_edge": loaded.image_processor.spec.height}
    with_image.tokenizer.image_token = IMAGE_TOKEN
    return DeepseekVLProcessor(
        Idefics3ImageProcessorPil(
            do_resize=False,  # the resize to `max_image_size` is the only one, and stretches
            do_image_splitting=False,
            size=side,
            max_image_size=side,
            **_pixels(loaded),
        ),
        with_image.tokenizer,
        num_image_tokens=loaded.model.num_query_tokens,
        chat_template=_chat_template(loaded, with_image.tokenizer),
    )


PROCESSORS: dict[str, Callable[[LoadedModel, TokenizerWithImage], Any]] = {
    "llava": llava_processor,
    "idefics3": idefics3_processor,
    "mmproj": llava_processor,
}
"""By the name of the format. llama.cpp splits a prompt at its images and special tokens, as this processor does."""


def num_class_tokens(loaded: LoadedModel) -> int:
    """Return how many tokens a CLIP or SigLIP tower has before its patches."""
    encoder: Any = loaded.model.vision_encoder
    return int(encoder.tower.config.model_type == "clip_vision_model")


def select_strategy(loaded: LoadedModel) -> Literal["default", "full"]:
    """Return LLaVA's name for what happens to the class token: `default` drops the first token, `full` keeps all."""
    dropped = loaded.model.vision_encoder.num_prefix_tokens == 0
    return "default" if num_class_tokens(loaded) and dropped else "full"


def prompts_differ(loaded: LoadedModel, to: str) -> str:
    """Return how the prompts of the processor of a format differ from ours, in words; empty if they do not."""
    with_image = tokenizer_with_image(loaded)
    return prompt_difference(loaded, PROCESSORS[to](loaded, with_image), with_image.image_token_id)


def _size(loaded: LoadedModel) -> dict[str, int]:
    return {"height": loaded.image_processor.spec.height, "width": loaded.image_processor.spec.width}


def _pixels(loaded: LoadedModel) -> dict[str, Any]:
    spec = loaded.image_processor.spec
    return {"image_mean": list(spec.mean), "image_std": list(spec.std), "resample": _RESAMPLE[spec.interpolation]}


def _chat_template(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the conversation template as a chat template, also set on `tokenizer`."""
    tokenizer.chat_template = own_chat_template(loaded, IMAGE_TOKEN, str(tokenizer.bos_token or ""))
    return str(tokenizer.chat_template)


def own_chat_template(loaded: LoadedModel, image_token: str, bos_token: str) -> str:
    """Return the conversation template of a model as a Jinja program, with BOS if the template has it."""
    encoder = loaded.conversation
    has_bos = encoder.chat_template.starts_with_bos and encoder.tokenizer.bos_id is not None
    return chat_template(encoder.chat_template, image_token, bos_token if has_bos else "", encoder.settings.system)


def prompt_difference(loaded: LoadedModel, processor: Any, image_token_id: int) -> str:
    """Return where a processor's prompts first differ from ours, in words; empty if nowhere.

    Args:
        loaded: the model whose prompts are expected.
        processor: a processor of transformers with a chat template.
        image_token_id: of the token that stands for images.
    """
    for turns in _DIALOGUES:
        dialogue = Dialogue(tuple(Turn(*turn) for turn in turns))
        images = dialogue.num_image_marks or 1
        try:
            encoded = loaded.conversation.encode_prompt(dialogue, num_images=images)
        except ConversationError as error:
            return str(error)
        ours = torch.where(encoded.image_mask, image_token_id, encoded.input_ids).tolist()
        theirs = stock_prompt(processor, turns, images)
        if theirs != ours:
            place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            tokenizer = processor.tokenizer
            shown = [json.dumps(tokenizer.decode(ids[max(0, place - 3) : place + 5])) for ids in (ours, theirs)]
            return f"its prompt of {len(turns)} turn(s) has {shown[1]} where this model was trained with {shown[0]}"
    return ""


def stock_prompt(processor: Any, turns: tuple[tuple[str, str | None], ...], num_images: int) -> list[int]:
    """Return the ids that a processor builds, from messages as users of transformers write them."""
    picture = Image.new("RGB", (8, 8))
    has_marks = any(IMAGE_MARK in question for question, _ in turns)
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        content: list[dict[str, Any]] = []
        if index == 0 and not has_marks:
            content += [{"type": "image", "image": picture}] * num_images
        for number, text in enumerate(question.split(IMAGE_MARK)):
            content += [{"type": "image", "image": picture}] * bool(number)
            content += [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    built = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    ids: list[int] = torch.as_tensor(built["input_ids"]).flatten().tolist()  # with or without a batch dimension
    return ids

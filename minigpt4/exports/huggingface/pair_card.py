"""The README of an exported pair: its parts, how to use it, and where it is exact."""

from __future__ import annotations

from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vision-language, {tag}]
---
# {name}

A language model that was given eyes by training a projector ({version}), as `{architecture}`. {trained}

| part | from | precision |
|---|---|---|
{parts}

Training steps: {step}. Conversation format: `{template}`.
{notes}
## Usage

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", backend="pil")
model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
content = [{{"type": "image", "image": Image.open("photo.jpg")}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
answer = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

## Notes

- **Prompts.** The chat template builds the token ids of training, with {queries} times `<image>` for each image. They
  were compared when the folder was written. A special token typed by a user becomes that token; in training it is text.
- **Projector.** {projector}
- **Images** are stretched to {height} x {width} pixels with PIL's filter. The default backend of transformers resizes
  with torchvision, whose values differ by up to one step of 255; `backend="pil"` is exact.
- **Precision.** The files hold each part in the precision it was used in; transformers casts all of them to one. With
  `dtype="auto"` it is that of the language model, {dtype}, which rounds the vision tower, too.
- **Stopping.** Answers end at the ids in `generation_config.json`{stop}.
"""
_PROJECTORS = {
    "": "One matrix without bias, as Idefics3 has it.",
    "mlp": "Two layers with GELU, as they were trained.",
    "exact": "One linear layer, written as LLaVA's first one; its activation is `linear` and its second layer the "
    "identity, so nothing is rounded. Servers that do not know this activation need an export with `--projector gelu`.",
    "gelu": "One linear layer, written as two layers with GELU: the first makes x and -x of every feature, and "
    "gelu(x) - gelu(-x) = x. In float32 the image embeds differ by rounding only (about 3e-6).",
}


def pair_card(loaded: LoadedModel, to: str, name: str, activation: str, layout: str) -> str:
    """Return the text of README.md.

    Args:
        loaded: the exported model.
        to: llava or idefics3.
        name: of the folder.
        activation: between the two layers of LLaVA; empty for Idefics3.
        layout: how a linear projector was written.
    """
    from minigpt4 import __version__

    model, manifest = loaded.model, loaded.manifest
    rows = []
    for part in ("vision_encoder", "resampler", "llama_proj", "language_model"):
        module = getattr(model, part)
        source = Path(getattr(module, "source", "")).name or type(module).__name__
        parameter = next(module.parameters(), None)
        precision = "" if parameter is None else str(parameter.dtype).removeprefix("torch.")
        rows.append(f"| {part} | {source} | {precision} |")
    trained = sorted(set(model.trainable) | {tensor.split(".")[0] for tensor in model.inherited})
    is_linear = hasattr(model.llama_proj, "weight")
    end = loaded.conversation.training_template.end
    special = end in loaded.conversation.tokenizer.special_tokens
    return _CARD.format(
        name=name,
        tag=to,
        version=f"minigpt4 {__version__}",
        architecture={"llava": "LlavaForConditionalGeneration", "idefics3": "Idefics3ForConditionalGeneration"}[to],
        trained=f"Trained: {', '.join(trained)}." + (" Adapters are merged." if "lora" in trained else ""),
        parts="\n".join(rows),
        step=manifest.step if manifest else "none",
        template=loaded.conversation.chat_template.name,
        notes="".join(f"\n- {note}" for note in manifest.notes) + "\n" if manifest and manifest.notes else "",
        queries=model.num_query_tokens,
        projector=_PROJECTORS[(layout if is_linear else "mlp") if activation else ""],
        height=loaded.image_processor.spec.height,
        width=loaded.image_processor.spec.width,
        dtype=str(model.language_model.dtype).removeprefix("torch."),
        stop=""
        if special or not end.strip()
        else f"; this format also ends them at the text `{end.strip()}`: pass "
        f"`stop_strings=[{end!r}], tokenizer=processor.tokenizer` to `generate`",
    )

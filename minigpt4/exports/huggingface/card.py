"""The README of an exported folder: the parts of the model, how to use it, and where it is exact."""

from __future__ import annotations

from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vision-language, minigpt-4]
---
# {name}

A MiniGPT-4 ({version}) as `Blip2ForConditionalGeneration`: EVA-ViT-g and Q-Former, one linear layer
(`language_projection`, our `llama_proj`), and a LLaMA. {trained}

| part | from | precision | fingerprint |
|---|---|---|---|
{parts}

Training steps: {step}. Conversation format: `{template}` (`prompt_format.json`).
{notes}
## Usage

```sh
python example.py --image photo.jpg --question "What is this?"
```

```python
from example import Answerer

answerer = Answerer(dtype="float32")
print(answerer.answer(["photo.jpg"], [("What is this?", None)]))
```

`example.py` needs only transformers (5 or later), torch and Pillow.

## Notes

- **Prompts.** The image is *inside* the prompt: {queries} times the token `<image>` (id {image_token}).
  `example.py` builds exactly the token ids of training. `processor(images=..., text=...)` alone does not: it tokenises
  the text as one piece and does not place the image.
- **One epsilon.** transformers has one epsilon for all norms of the image encoder (1e-6); this model's last norm has
  1e-5. `example.py` sets it after loading, which is exact. Without that line the image embeds of a noise image
  change by up to {difference:.1e} (the largest is {largest:.1f}).
- **Precision.** The files contain each part in the precision it was used in, but transformers casts all of them to
  one. `"auto"` is that of the language model, {dtype}, which also rounds the image encoder; `dtype="float32"` rounds
  nothing.
- **`<image>` is never part of an answer.** `example.py` suppresses it; do the same (`suppress_tokens`) in your own
  calls of `generate`.
- **Stopping.** Answers end at the end-of-sequence id or at `{end}`.
"""


def model_card(loaded: LoadedModel, name: str, image_token_id: int, norm_difference: tuple[float, float]) -> str:
    """Return the text of README.md.

    Args:
        loaded: the exported model.
        name: of the folder.
        image_token_id: of `<image>`.
        norm_difference: largest change of an image embed with transformers' epsilon, and the largest embed.
    """
    from minigpt4 import __version__

    model, manifest = loaded.model, loaded.manifest
    parts = manifest.parts if manifest else {}
    rows = []
    for part in ("vision_encoder", "resampler", "llama_proj", "language_model"):
        module = getattr(model, part)
        source = Path(getattr(module, "source", "")).name or type(module).__name__
        precision = str(next(module.parameters()).dtype).removeprefix("torch.")
        rows.append(f"| {part} | {source} | {precision} | {parts[part].fingerprint if part in parts else ''} |")
    trained = sorted(set(model.trainable) | {tensor.split(".")[0] for tensor in model.inherited})
    return _CARD.format(
        name=name,
        version=f"minigpt4 {__version__}",
        trained=f"Trained: {', '.join(trained)}." + (" Adapters are merged." if "lora" in trained else ""),
        parts="\n".join(rows),
        step=manifest.step if manifest else "none",
        template=loaded.conversation.chat_template.name,
        notes="".join(f"\n- {note}" for note in manifest.notes) + "\n" if manifest and manifest.notes else "",
        queries=model.num_query_tokens,
        image_token=image_token_id,
        difference=norm_difference[0],
        largest=norm_difference[1],
        dtype=str(model.language_model.dtype).removeprefix("torch."),
        end=loaded.conversation.training_template.end.replace("\n", "\\n"),
    )

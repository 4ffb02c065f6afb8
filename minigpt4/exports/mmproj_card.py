"""The README next to an exported `mmproj.gguf`: the command for llama.cpp, and where its answers may differ."""

from __future__ import annotations

from pathlib import Path

from minigpt4.checkpoints.assemble import LoadedModel

_CARD = """# {name}

Vision tower and projector ({version}) for llama.cpp, to use with a GGUF of the unchanged language model:
**{language_model}**.

```sh
llama-server -m {language_model}.gguf --mmproj {name}/mmproj.gguf \\
  --jinja --chat-template-file {name}/chat_template.jinja --temp 0{stop}
```

`chat_template.jinja` writes the prompts of training (`{template}`). llama.cpp may join an image and the text after it
without the blank that training had between them: begin the text with a blank.

- **Language model.** It must be the one that the projector was trained with: another one of the same size answers
  nonsense. Any quantisation of it works; the answers vary as it does.
- **Projector.** {projector}
- **Numbers.** Matrices are stored as {numbers}; norms, biases and position embeddings as float32. llama.cpp computes
  GELU from a table in float16, so image embeds differ by about 1e-3 of their size even with f32.
- **Images.** llama.cpp resizes images itself. A square image of {side} x {side} pixels is used as it is. Others are
  scaled to that size with llama.cpp's own filter, which is not PIL's; and it may pad an image that is not square with
  grey, where training stretched it.
"""


def mmproj_card(loaded: LoadedModel, name: str, numbers: str) -> str:
    """Return the text of README.md.

    Args:
        loaded: the exported model.
        name: of the folder.
        numbers: how matrices are stored.
    """
    from minigpt4 import __version__

    template = loaded.conversation.training_template
    special = template.end in loaded.conversation.tokenizer.special_tokens
    is_linear = hasattr(loaded.model.llama_proj, "weight")
    return _CARD.format(
        name=name,
        version=f"minigpt4 {__version__}",
        language_model=Path(loaded.model.language_model.source).name.removesuffix(".gguf"),
        stop="" if special or not template.end.strip() else f" --reverse-prompt '{template.end.strip()}'",
        template=loaded.conversation.chat_template.name,
        projector="One linear layer, written as two layers with GELU: the first makes x and -x of every feature, and "
        "gelu(x) - gelu(-x) = x."
        if is_linear
        else "Two layers with GELU, as they were trained.",
        numbers=numbers,
        side=loaded.image_processor.spec.height,
    )

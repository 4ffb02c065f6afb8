"""A conversation template as the chat template of a tokenizer: a Jinja program that transformers and servers run.

Input: a `Template` and a system text. Output: the program. Images are parts of a message's content, as
`{"type": "image"}`; each becomes the image token. (llama.cpp gives them as `media_marker`, with a text of its own.)
"""

from __future__ import annotations

import json
import string

from minigpt4.conversation.dialogue import IMAGE_MARK
from minigpt4.conversation.templates import ASSISTANT, SYSTEM, USER, Template

_PROGRAM = string.Template("""\
{%- macro text(content, image) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- set state = namespace(after_image=false) -%}
{%- for part in content -%}
{%- if part.type in ['image', 'image_url', 'media_marker'] -%}
{{ part.text if part.type == 'media_marker' else image }}{%- set state.after_image = true -%}
{%- elif part.text -%}
{%- if state.after_image and part.text[:1] not in [' ', '\\n'] -%}{{ ' ' }}{%- endif -%}
{{ part.text }}{%- set state.after_image = false -%}
{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- if messages[0].role == 'system' -%}{{ $system }}{%- set turns = messages[1:] -%}
{%- else -%}{{ $opening }}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{ $before if loop.first else $next_before }}{{ text(message.content, $image)$question }}
{%- if not loop.last or add_generation_prompt -%}{{ $after if loop.first else $next_after }}{%- endif -%}
{%- elif message.role == 'assistant' -%}{{ $before_answer }}{{ text(message.content, '')$answer }}{{ $end }}
{%- else -%}{{ raise_exception('unknown role ' ~ message.role) }}{%- endif -%}
{%- endfor -%}""")


def chat_template(template: Template, image_token: str, bos: str, system: str = "") -> str:
    """Return a template as a Jinja program.

    Args:
        template: the conversation format.
        image_token: what stands for an image.
        bos: the text of the token that comes first, empty if there is none.
        system: in front of dialogues that have no system text; empty: the template's own opening.
    """
    (before, after), (next_before, next_after) = template.around_question(0), template.around_question(1)
    texts = {
        "opening": bos + template.before_all(system or None),
        "before": before,
        "after": after,
        "next_before": next_before,
        "next_after": next_after,
        "image": template.image.replace(IMAGE_MARK, image_token),
        "before_answer": template.before_answer,
        "end": template.end,
    }
    return _PROGRAM.substitute(
        {name: _literal(text) for name, text in texts.items()},
        system=_system(template, bos),
        question=_trim(template, USER),
        answer=_trim(template, ASSISTANT),
    )


def _system(template: Template, bos: str) -> str:
    """Return the expression for a message with the role `system`."""
    if template.system is None:
        return "raise_exception('this format has no system text')"
    before, after = template.system
    return f"{_literal(bos + before)} ~ (text(messages[0].content, ''){_trim(template, SYSTEM)}) ~ {_literal(after)}"


def _trim(template: Template, role: str) -> str:
    return " | trim" if role in template.stripped else ""


def _literal(text: str) -> str:
    """Return text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)

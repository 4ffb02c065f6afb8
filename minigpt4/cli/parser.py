"""The arguments of every verb. Output: a parser whose result holds the verb's function and its arguments."""

from __future__ import annotations

import argparse
from typing import Any

from minigpt4.cli import data_verbs, verbs

_EPILOG = """\
minigpt4 VERB --help shows the arguments of a verb.

exit status:
  0    done
  1    an error, explained in one message on standard error (--debug shows its traceback)
  2    wrong usage: an unknown verb or option, or a missing argument
  130  interrupted with Ctrl-C
"""

_FORMATS = ("published", "huggingface", "llava", "idefics3", "mmproj", "prompt-embeds")
"""The names in `minigpt4.exports.fitting.MISFIT`, which takes seconds to import."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; it sets `verb` to the function to call."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = argparse.ArgumentParser(
        prog="minigpt4",
        description="Vision-language alignment: an image encoder and a language model, joined by one trained layer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    named = parser.add_subparsers(metavar="VERB", required=True)

    train = named.add_parser("train", help="train a model as a config describes", parents=[common])
    _add_config(train, default=None)
    train.set_defaults(verb=verbs.train)

    plan = named.add_parser(
        "plan", help="show what a run needs: memory, time, disk; reads no weights", parents=[common]
    )
    _add_positional_config(plan)
    plan.add_argument(
        "--device", nargs="+", default=[], metavar="NAME", help="A100, H100, 4090, ... (default: a few, and this CPU)"
    )
    plan.add_argument("--ranks", type=int, default=1, metavar="N", help="number of devices (default: 1)")
    plan.add_argument(
        "--utilisation", type=float, default=0.4, metavar="SHARE", help="share of the peak reached (default: 0.4)"
    )
    plan.add_argument("--memory", type=float, default=0.0, metavar="GIB", help="memory of a device of another size")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(verb=verbs.plan)

    cache = named.add_parser("cache", help="write the features of all images once", parents=[common])
    _add_positional_config(cache)
    cache.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="precision in which features are stored (default: %(default)s)",
    )
    cache.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    cache.set_defaults(verb=verbs.cache)

    evaluate = named.add_parser(
        "evaluate", help="ask a model questions with known answers, and score it", parents=[common]
    )
    _add_config(evaluate)
    evaluate.add_argument(
        "--rescore", default="", metavar="FILE", help="score the answers in this file again, without a model"
    )
    evaluate.set_defaults(verb=verbs.evaluate)

    compare = named.add_parser("compare", help="test whether two models differ on the same questions", parents=[common])
    compare.add_argument("a", metavar="A", help="an answer file of `evaluate`, or a checkpoint folder to evaluate")
    compare.add_argument("b", metavar="B", help="the same for the other model")
    compare.add_argument(
        "--out",
        default="output/comparison",
        metavar="PATH",
        help="written with .json, .md, .tex (default: %(default)s)",
    )
    _add_options(compare)
    compare.set_defaults(verb=verbs.compare)

    chat = named.add_parser("chat", help="ask about images in the terminal", parents=[common])
    _add_config(chat)
    _add_images(chat)
    chat.add_argument(
        "--question",
        metavar="TEXT",
        help="ask one question and exit; without it, chat in the terminal or read one question per line from a pipe",
    )
    _add_device(chat)
    chat.set_defaults(verb=verbs.chat)

    export = named.add_parser("export", help="write a model in the format of another tool", parents=[common])
    export.add_argument("cfg_path", metavar="CHECKPOINT_OR_NAME", help="a checkpoint folder, a YAML file or its name")
    export.add_argument("--to", required=True, choices=_FORMATS, help="the format")
    export.add_argument("--out", required=True, metavar="PATH", help="a new folder; for published a new .pth file")
    export.add_argument(
        "--projector",
        choices=("exact", "gelu"),
        help="llava: how a linear projector is written; gelu for servers without the activation linear",
    )
    export.add_argument("--numbers", choices=("f32", "f16", "q8_0"), help="mmproj: how matrices are stored (f16)")
    _add_images(export, "prompt-embeds: ")
    export.add_argument("--question", default="", metavar="TEXT", help="prompt-embeds: the question")
    _add_device(export, default="cpu")
    _add_options(export)
    export.set_defaults(verb=verbs.export)

    caption = named.add_parser("caption", help="describe every image in a folder", parents=[common])
    _add_config(caption)
    caption.add_argument("--images", required=True, metavar="DIR", help="folder of images, with its subfolders")
    caption.add_argument("--out", required=True, metavar="FILE", help="JSON lines; an unfinished file is continued")
    caption.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per batch (default: 8)")
    caption.add_argument(
        "--prompt",
        default="Describe this image in detail.",
        metavar="TEXT",
        help="question about each image (default: %(default)s)",
    )
    _add_device(caption)
    caption.set_defaults(verb=verbs.caption)

    serve = named.add_parser("serve", help="serve a model over HTTP with OpenAI's chat interface", parents=[common])
    _add_config(serve)
    _add_address(serve, port=8000)
    serve.add_argument(
        "--api-key-file",
        default="",
        metavar="FILE",
        help="file with the key that clients must send (default: the variable MINIGPT4_API_KEY, or no key)",
    )
    serve.set_defaults(verb=verbs.serve)

    demo = named.add_parser("demo", help="chat in the browser", parents=[common])
    _add_config(demo)
    _add_address(demo, port=7860)
    demo.add_argument("--share", action="store_true", help="open a public tunnel through Gradio's servers")
    demo.set_defaults(verb=verbs.demo)

    data = named.add_parser("data", help="pack, check and show training data", parents=[common])
    _add_data(data.add_subparsers(metavar="WHAT", required=True), common)

    assets = named.add_parser("assets", help="download weights and data sets by name", parents=[common])
    assets.add_argument("names", nargs="+", metavar="NAME", help="an asset, or a group of assets such as mini")
    assets.add_argument("--path", action="store_true", help="print only the paths")
    assets.set_defaults(verb=verbs.fetch_assets)

    inspect = named.add_parser("inspect", help="show what weight files and folders contain", parents=[common])
    inspect.add_argument("paths", nargs="+", metavar="PATH", help="a file or folder of weights")
    inspect.set_defaults(verb=verbs.inspect)

    migrate = named.add_parser("migrate", help="convert a config of the published code", parents=[common])
    migrate.add_argument("old", metavar="OLD", help="a YAML file of the published code")
    migrate.add_argument("--out", metavar="FILE", help="the new file (default: standard output)")
    migrate.set_defaults(verb=verbs.migrate)

    config = named.add_parser("config", help="show type, default and meaning of config keys", parents=[common])
    shown = config.add_mutually_exclusive_group()
    shown.add_argument("key", nargs="?", default="", metavar="KEY", help="SECTION or SECTION.KEY (default: all keys)")
    shown.add_argument("--markdown", action="store_true", help="print all keys as one Markdown page")
    config.set_defaults(verb=verbs.describe_config)

    names = named.add_parser("list", help="list the names that a config can use", parents=[common])
    names.set_defaults(verb=verbs.list_names)
    return parser


def _add_data(named: Any, common: argparse.ArgumentParser) -> None:
    """Add what `data` can do."""
    pack = named.add_parser("pack", help="write pairs of images and captions as WebDataset shards", parents=[common])
    pack.add_argument("source", metavar="SOURCE", help="a folder, or a JSON, JSONL, CSV, TSV or Parquet file")
    pack.add_argument("--out", required=True, metavar="DIR", help="a new folder; an unfinished one is continued")
    pack.add_argument("--image-dir", metavar="DIR", help="folder of the image paths (default: that of the file)")
    pack.add_argument("--image-key", default="", metavar="KEY", help="key of the image (default: image or images)")
    pack.add_argument("--caption-key", default="caption", metavar="KEY", help="key of the caption (default: caption)")
    pack.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="most pairs in one tar file (default: 10000)"
    )
    pack.add_argument("--unchecked", action="store_true", help="do not decode the images: faster")
    pack.add_argument(
        "--max-rejected",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="stop when more of the rows cannot be used (default: %(default)s)",
    )
    pack.set_defaults(verb=data_verbs.pack)

    validate = named.add_parser("validate", help="check data, and write a report about it", parents=[common])
    _add_target(validate)
    validate.add_argument(
        "--images", default="all", metavar="N", help="images that are opened: a number, or all (default: all)"
    )
    validate.add_argument(
        "--report", default="data-report.html", metavar="FILE", help="the report (default: %(default)s)"
    )
    validate.add_argument("--problems", default="", metavar="FILE", help="every problem as a line of JSON")
    validate.set_defaults(verb=data_verbs.validate)

    preview = named.add_parser("preview", help="write a page of images and their texts", parents=[common])
    _add_target(preview)
    preview.add_argument("--out", default="data-preview.html", metavar="FILE", help="the page (default: %(default)s)")
    preview.add_argument("--count", type=int, default=60, metavar="N", help="rows of each data set (default: 60)")
    preview.set_defaults(verb=data_verbs.preview)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="CONFIG|PATH", help="a config, whose data sets are read; or a file or folder of data"
    )
    parser.add_argument(
        "--image-dir", metavar="DIR", help="PATH: folder of the image paths (default: that of the file)"
    )
    parser.add_argument(
        "--cfg-path", default="", metavar="FILE", help="PATH: a config whose tokenizer and template are used"
    )
    _add_options(parser)


class _Version(argparse.Action):
    """Print the version; it is looked up only when it is asked for, because that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from minigpt4 import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def _add_images(parser: argparse.ArgumentParser, only: str = "") -> None:
    parser.add_argument("--image", nargs="*", default=[], metavar="FILE", help=f"{only}one image, several, or none")


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add where to listen and where to compute."""
    _add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")


def _add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument("--device", default=default, help="auto, cpu, cuda or mps (default: %(default)s)")


def _add_config(parser: argparse.ArgumentParser, default: str | None = verbs.MINI) -> None:
    """Add `--cfg-path`, required without a default, and `--options`."""
    parser.add_argument(
        "--cfg-path",
        metavar="FILE",
        default=default,
        required=default is None,
        help="a YAML file or the name of a shipped one" + (f" (default: {default})" if default else ""),
    )
    _add_options(parser)


def _add_positional_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cfg_path", metavar="CONFIG", help="a YAML file or the name of a shipped one")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override config values: run.seed=1 model.language_model.path=FOLDER",
    )

"""The arguments of every verb. Output: a parser whose result holds the verb's function and its arguments."""

from __future__ import annotations

import argparse

from minigpt4.cli import verbs


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; it sets `verb` to the function to call."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = argparse.ArgumentParser(prog="minigpt4", description="Vision-language alignment.", parents=[common])
    named = parser.add_subparsers(metavar="VERB", required=True)

    job = named.add_parser("train", help="train as a config says", parents=[common])
    _add_config(job, default=None)
    job.set_defaults(verb=verbs.train)

    scoring = named.add_parser("evaluate", help="score a model on easy-VQA's test split", parents=[common])
    _add_config(scoring, default=verbs.MINI)
    scoring.set_defaults(verb=verbs.evaluate)

    talk = named.add_parser("chat", help="ask one question about an image", parents=[common])
    _add_config(talk, default=verbs.MINI)
    talk.add_argument("--image", nargs="*", default=[], metavar="FILE", help="the image, or several, or none")
    talk.add_argument("--question", required=True, metavar="TEXT", help="what to ask")
    _add_device(talk)
    talk.set_defaults(verb=verbs.chat)

    out = named.add_parser("export", help="write a model in another tool's format", parents=[common])
    out.add_argument("cfg_path", metavar="CHECKPOINT_OR_NAME", help="a checkpoint folder, a YAML, or the name of one")
    out.add_argument("--to", required=True, choices=("published", "huggingface", "prompt-embeds"), help="the format")
    out.add_argument("--out", required=True, metavar="PATH", help="a new folder; for published a new .pth file")
    out.add_argument("--image", nargs="*", default=[], metavar="FILE", help="prompt-embeds: the image, or several")
    out.add_argument("--question", default="", metavar="TEXT", help="prompt-embeds: what to ask")
    _add_device(out, default="cpu")
    _add_options(out)
    out.set_defaults(verb=verbs.export)

    describe = named.add_parser("caption", help="describe every image of a folder", parents=[common])
    _add_config(describe, default=verbs.MINI)
    describe.add_argument("--images", required=True, metavar="DIR", help="folder of images; those below it, too")
    describe.add_argument("--out", required=True, metavar="FILE", help="JSON lines; a file begun before is completed")
    describe.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    describe.add_argument(
        "--prompt",
        default="Describe this image in detail.",
        metavar="TEXT",
        help="what is asked (default: %(default)s)",
    )
    _add_device(describe)
    describe.set_defaults(verb=verbs.caption)

    service = named.add_parser("serve", help="serve OpenAI's chat interface over HTTP", parents=[common])
    _add_config(service, default=verbs.MINI)
    _add_address(service, port=8000)
    service.add_argument(
        "--api-key-file",
        default="",
        metavar="FILE",
        help="file with the key that clients need (default: the variable MINIGPT4_API_KEY, or no key)",
    )
    service.set_defaults(verb=verbs.serve)

    page = named.add_parser("demo", help="chat in the browser", parents=[common])
    _add_config(page, default=verbs.MINI)
    _add_address(page, port=7860)
    page.add_argument("--share", action="store_true", help="open a public tunnel through Gradio's servers")
    page.set_defaults(verb=verbs.demo)

    assets = named.add_parser("assets", help="fetch weights and data sets by name", parents=[common])
    assets.add_argument("names", nargs="+", metavar="NAME", help="an asset, or a set of them such as mini")
    assets.add_argument("--path", action="store_true", help="print only the paths")
    assets.set_defaults(verb=verbs.fetch_assets)

    looking = named.add_parser("inspect", help="tell what weight files and folders are", parents=[common])
    looking.add_argument("paths", nargs="+", metavar="PATH", help="a file or folder of weights")
    looking.set_defaults(verb=verbs.inspect)

    rewriting = named.add_parser("migrate", help="rewrite a config of the published code", parents=[common])
    rewriting.add_argument("old", metavar="OLD", help="a YAML file of the published code")
    rewriting.add_argument("--out", metavar="FILE", help="where the new one goes (default: standard output)")
    rewriting.set_defaults(verb=verbs.migrate)

    names = named.add_parser("list", help="show every name a config may use", parents=[common])
    names.set_defaults(verb=verbs.list_names)
    return parser


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add where to listen and where to compute."""
    _add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")


def _add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument("--device", default=default, help="where to compute (default: %(default)s)")


def _add_config(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add `--cfg-path`, required without a default, and `--options`."""
    parser.add_argument(
        "--cfg-path",
        metavar="FILE",
        default=default,
        required=default is None,
        help="a YAML file or the name of a shipped one" + (f" (default: {default})" if default else ""),
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override settings: run.seed=1 model.language_model.path=FOLDER",
    )

"""The command `jaxgen`: what it takes. What each command does is in a file of its name, imported when asked for.

What `convert` and `verify` do is in `jaxgen.convert.command`.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from io import TextIOWrapper

from jaxgen.cli.options import add_decoding_options
from jaxgen.version import __version__

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with _interrupts_end_the_process():
            parsed = _parser().parse_args(arguments)
            if parsed.command not in ("convert", "verify"):
                if sys.stdout is None:
                    raise ValueError("standard output is closed: there is nowhere to write to.")
                if isinstance(sys.stdin, TextIOWrapper):  # whatever the locale; what is no UTF-8 is noticed later
                    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
                return importlib.import_module(f"jaxgen.cli.{parsed.command}").run(parsed)
            # The converter imports the package, never the reverse: it is looked up by name.
            converter = importlib.import_module("jaxgen.convert.command")
        return converter.run(parsed)  # an interrupt is its own: it says how to go on
    except BrokenPipeError:  # as in `jaxgen generate ... | head -c 5`: nobody reads on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for what would be flushed at the end
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"jaxgen: {error.filename}: {error.strerror}" if error.filename else f"jaxgen: {error}", file=sys.stderr)
    except ValueError as error:
        print(f"jaxgen: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("jaxgen: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


@contextlib.contextmanager
def _interrupts_end_the_process() -> Iterator[None]:
    """Ctrl-C at once and without a traceback, also within what would swallow an exception; `chat` has its own."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread, to which no signal comes
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxgen", description="Hugging Face generate() for JAX.")
    parser.add_argument("--version", action="version", version=f"jaxgen {__version__}, jax {version('jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        usage="jaxgen generate [options] [TEXT]",
        description="Continues a text, as the checkpoint's own settings have it.",
        allow_abbrev=False,
    )
    generate.add_argument("prompt", metavar="TEXT", nargs="?", help="what to continue; standard input by default")
    generate.add_argument("--file", metavar="FILE", help="a file with the text instead; - for standard input")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="ask TEXT as a question, by the checkpoint's chat template; print the answer",
    )
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from, with --guidance-scale")

    chat = commands.add_parser(
        "chat",
        help="talk with a model that was made for it",
        usage="jaxgen chat [options]",
        description="Talks with a model. The cache is kept, so each turn reads only what is new.",
        allow_abbrev=False,
    )
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--chat-template", metavar="FILE", help="a Jinja template; the checkpoint's own by default")
    for parser_with_model in (generate, chat):
        _add_model_options(parser_with_model)
        add_decoding_options(parser_with_model)

    inspect = commands.add_parser(
        "inspect", help="what a folder holds", description="Says what a checkpoint holds, without loading it."
    )
    inspect.add_argument("folder", metavar="FOLDER", help="a Hugging Face or converted folder")
    _add_links_option(inspect)
    plan = commands.add_parser(
        "plan",
        help="whether a model, a batch and a context fit a device",
        description="Says what a call needs of each device, and what would fit if it does not. Nothing is loaded.",
        epilog="Ends with 0 if it fits and with 1 if not.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "model", metavar="MODEL", help="1b, 8b, 70b or 405b for a Llama 3 of that size, else a folder (./8b is one)"
    )
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="prompts (default: 1)")
    plan.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="of each (default: 1024)")
    plan.add_argument("--new-tokens", type=int, default=256, metavar="N", help="for each (default: 256)")
    plan.add_argument("--num-beams", type=int, default=1, metavar="N")
    plan.add_argument("--num-return-sequences", type=int, default=1, metavar="N")
    plan.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's own")
    plan.add_argument("--quantize", choices=("int8",), help="weights of one byte")
    plan.add_argument(
        "--device", metavar="KIND", help="v5e, v6e, v5p, h100, h200, a100-80g, a100-40g or l4; default: what is here"
    )
    plan.add_argument("--mesh", default="1x1", metavar="DATAxTENSOR", help="devices for rows, and for heads and units")
    _add_links_option(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    doctor = commands.add_parser(
        "doctor", help="what is installed", description="Says what is installed, where it runs and what is wrong."
    )
    _add_cache_option(doctor)
    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face folder to jaxgen's own format, or back",
        description="Converts a Hugging Face checkpoint to jaxgen's own format, and back.",
        allow_abbrev=False,
    )
    convert.add_argument(
        "src",
        metavar="SRC",
        help="a folder with config.json and safetensors, only read, or owner/name of a model to download from the hub",
    )
    convert.add_argument("dst", metavar="DST", help="the folder to make; it appears when it is complete")
    convert.add_argument(
        "--to-hf", action="store_true", help="the way back: SRC was converted, DST is as it was before"
    )
    convert.add_argument("--dtype", choices=_DTYPES, help="default: each tensor's own")
    convert.add_argument("--shard-size", metavar="SIZE", help="largest file, in bytes or as 5GB, which is the default")
    convert.add_argument("--workers", type=int, metavar="N", help="threads that copy; default: 4")
    convert.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST, at the end")
    convert.add_argument("--resume", action="store_true", help="go on with what an interrupted conversion left")
    convert.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model.bin and consolidated.*.pth, which are pickles",
    )
    convert.add_argument("--merge-lora", metavar="FOLDER", help="a LoRA adapter to add to the weights")
    _add_links_option(convert)
    verify = commands.add_parser(
        "verify",
        help="read a whole checkpoint and say whether it is sound",
        description="Reads a whole checkpoint and says whether it is sound.",
    )
    verify.add_argument("folder", metavar="DIR", help="a Hugging Face or converted folder")
    _add_links_option(verify)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="a Hugging Face or converted folder; bundled story model by default"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--quantize", choices=("int8",), help="hold the weights in one byte each")
    _add_links_option(parser)
    _add_cache_option(parser)


def _add_links_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow-links", action="store_true", help="also read files elsewhere that links lead to")


def _add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile-cache",
        metavar="FOLDER",
        help="where compiled programs are kept, or off; default: $JAXGEN_COMPILE_CACHE, else the user's cache folder",
    )

"""The command `jaxgen` and its options. Each command runs in the module of its name, which is imported on demand.

`convert` and `verify` run in `jaxgen.convert.command`.
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

from jaxgen.cli.note import waiting
from jaxgen.cli.options import add_decoding_options
from jaxgen.version import __version__

_DTYPES = ("float32", "bfloat16", "float16")
_FOLDER = "a Hugging Face or converted folder, a GGUF file"
_NAME = "owner/name of a model on the Hugging Face hub, which is downloaded to its cache"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with _interrupts_end_the_process():
            parsed = _parser().parse_args(arguments)
            if parsed.command not in ("convert", "verify"):
                if sys.stdout is None:
                    raise ValueError("standard output is closed. Open one for the command to write to.")
                if isinstance(
                    sys.stdin, TextIOWrapper
                ):  # whatever the locale; `checked_text` reports bytes that are not UTF-8
                    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
                with waiting("loading the program ..."):
                    command = importlib.import_module(f"jaxgen.cli.{parsed.command}")
                return command.run(parsed)
            # By name, since the package must not import the converter.
            converter = importlib.import_module("jaxgen.convert.command")
        return converter.run(parsed)  # they handle Ctrl-C themselves, to say how to resume
    except BrokenPipeError:  # as in `jaxgen generate ... | head -c 5`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it at exit
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
    """Makes Ctrl-C end the process without a traceback, even where a KeyboardInterrupt would be caught."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # only the main thread gets signals
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
        description="Continues a text, with the checkpoint's own settings by default.",
        allow_abbrev=False,
    )
    chat = commands.add_parser(
        "chat",
        help="talk with a chat model",
        usage="jaxgen chat [options]",
        description="Talks with a model. The cache is kept, so each turn reads only new tokens.",
        allow_abbrev=False,
    )
    inspect = commands.add_parser(
        "inspect", help="describe a checkpoint", description="Describes a checkpoint without loading it."
    )
    plan = commands.add_parser(
        "plan",
        help="whether a model, a batch and a context fit in a device's memory",
        description="Shows how much memory a call needs on each device. If that is too much, shows what would fit.",
        epilog="The exit code is 0 if it fits and 1 if not.",
        allow_abbrev=False,
    )
    doctor = commands.add_parser(
        "doctor",
        help="check the installation",
        description="Lists versions and devices, and known problems with them.",
    )
    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face folder to jaxgen's own format, or back",
        description="Converts a Hugging Face checkpoint, or GGUF, to jaxgen's own format, and back.",
        allow_abbrev=False,
    )
    verify = commands.add_parser(
        "verify",
        help="read a whole checkpoint and check that it is intact",
        description="Reads a whole checkpoint and checks that it is intact.",
    )
    _add_generate_options(generate)
    _add_chat_options(chat)
    inspect.add_argument("folder", metavar="MODEL", help=f"{_FOLDER}, or {_NAME}")
    _add_source_options(inspect)
    _add_plan_options(plan)
    _add_cache_option(doctor)
    _add_convert_options(convert)
    verify.add_argument("folder", metavar="MODEL", help=f"{_FOLDER}, or {_NAME}")
    _add_source_options(verify)
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        metavar="TEXT",
        nargs="?",
        help="the text to continue, or for an encoder to read; standard input by default",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="a file to read the text from, or with --chat a text that TEXT asks about; - for standard input",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask TEXT as a question, with the checkpoint's chat template; print only the answer",
    )
    _add_assistant_option(parser)
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="a text to steer away from, together with --guidance-scale"
    )
    parser.add_argument(
        "--mesh",
        metavar="SIZES",
        help="spread the model over devices, as tensor=8, or data=2,tensor=4 for several sequences of a prompt",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run together with the other processes of a job of Slurm, Open MPI, Kubernetes or a TPU pod, over the "
        "devices of all of them; the first one prints the text",
    )
    _add_model_options(parser)
    add_decoding_options(parser)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(mesh=None, distributed=False)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--load", metavar="FILE", help="continue the messages of a JSON file, as written by /save or other tools"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template; the checkpoint's own by default")
    _add_assistant_option(parser)
    _add_model_options(parser)
    add_decoding_options(parser)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"1b, 8b, 70b or 405b for a Llama 3 of that size, else a folder (./8b is one), a GGUF file, or {_NAME}",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="number of prompts (default: 1)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=1024, metavar="N", help="tokens per prompt (default: 1024)"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of new tokens per prompt (default: 256)",
    )
    parser.add_argument("--num-beams", type=int, default=1, metavar="N")
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N")
    _add_weight_options(parser)
    parser.add_argument(
        "--assistant",
        metavar="MODEL",
        help="like MODEL, what drafts tokens for it; or int8 or int4, for such a copy of it",
    )
    parser.add_argument("--num-assistant-tokens", type=int, metavar="N", help="tokens of a draft (default: 20)")
    parser.add_argument("--cache-backend", choices=["int8", "fp8"], help="plan for a quantised cache")
    parser.add_argument(
        "--device", metavar="KIND", help="v5e, v6e, v5p, h100, h200, a100-80g, a100-40g or l4; default: the local one"
    )
    parser.add_argument(
        "--mesh",
        default="1x1",
        metavar="SIZES",
        help="devices for rows, and for heads and MLP units, as 2x4 or data=2,tensor=4",
    )
    _add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src",
        metavar="SRC",
        help=f"a folder with config.json and safetensors or a GGUF file, which is only read, or {_NAME}",
    )
    parser.add_argument("dst", metavar="DST", help="the folder to create; it appears when it is complete")
    parser.add_argument(
        "--to-hf", action="store_true", help="convert back: SRC is a converted folder, and DST becomes the original"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="default: each tensor's own")
    parser.add_argument("--shard-size", metavar="SIZE", help="maximum size of a file, in bytes or as 5GB (the default)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that copy; default: 4")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST, at the end")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model.bin and consolidated.*.pth, which are pickles",
    )
    parser.add_argument("--merge-lora", metavar="FOLDER", help="a LoRA adapter to add to the weights")
    _add_source_options(parser)


def _add_weight_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's own")
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="hold the weights in one byte each, or in half a byte"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=f"{_FOLDER}, or {_NAME}; the bundled story model by default")
    _add_weight_options(parser)
    _add_source_options(parser)
    _add_cache_option(parser)


def _add_assistant_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--assistant",
        metavar="MODEL",
        help="a smaller model, best with the same tokenizer, which drafts tokens for the model to check; or int8 or "
        "int4, for such a copy of the model. The text stays the same",
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow-links", action="store_true", help="also read files outside the folder that its links lead to"
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a model on the hub; default: its branch main"
    )


def _add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile-cache",
        metavar="FOLDER",
        help="folder for compiled programs, or off; default: $JAXGEN_COMPILE_CACHE, else the user's cache folder",
    )

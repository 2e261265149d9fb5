"""`python -m convert SRC DST`, installed as `jaxgen convert SRC DST` and `jaxgen verify DIR`."""

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

from . import Report, convert_checkpoint, convert_to_hugging_face, verify
from .writing import neighbours


def main(argv: list[str] | None = None, prog: str = "python -m convert") -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{prog}: warning: {message}", file=sys.stderr)
            return _verify(arguments, prog) if prog.endswith("verify") else _convert(arguments, prog)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


def _convert(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts a Hugging Face checkpoint to jaxgen's own format, and back.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        help="a folder with config.json and safetensors, only read, or owner/name of a model to download from the hub",
    )
    parser.add_argument("dst", metavar="DST", help="the folder to make; it appears when it is complete")
    parser.add_argument("--to-hf", action="store_true", help="the way back: SRC was converted, DST is as it was before")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: each tensor's own")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest file, in bytes or as 5GB, which is the default")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that copy; default: 4")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST, at the end")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted conversion left")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model.bin and consolidated.*.pth, which are pickles",
    )
    parser.add_argument("--merge-lora", metavar="FOLDER", help="a LoRA adapter to add to the weights")
    _add_links_option(parser)
    arguments = parser.parse_args(argv)
    shared = {
        name: getattr(arguments, name) for name in ("shard_size", "workers", "overwrite", "resume", "follow_links")
    }
    if arguments.to_hf:
        for name in ("dtype", "allow_pickle", "merge_lora"):
            if getattr(arguments, name):
                parser.error(f"--{name.replace('_', '-')} does not go with --to-hf")
        function, own = convert_to_hugging_face, {}
    else:
        function = convert_checkpoint
        own = {name: getattr(arguments, name) for name in ("dtype", "allow_pickle", "merge_lora")}
    try:
        report = function(arguments.src, arguments.dst, **shared, **own)
    except (OSError, KeyboardInterrupt):
        if neighbours(Path(os.path.abspath(arguments.dst)))[0].exists():
            print(f"{prog}: not complete. The same command with --resume goes on from here.", file=sys.stderr)
        raise
    _print(report, "wrote", prog)
    print(f"load it with jaxgen.load({str(report.folder)!r})", file=sys.stderr)
    return 0


def _verify(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Reads a whole checkpoint and says whether it is sound.")
    parser.add_argument("folder", metavar="DIR", help="a Hugging Face or converted folder")
    _add_links_option(parser)
    arguments = parser.parse_args(argv)
    _print(verify(arguments.folder, follow_links=arguments.follow_links), "verified", prog)
    return 0


def _add_links_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow-links", action="store_true", help="also read files elsewhere that links lead to")


def _print(report: Report, verb: str, prog: str) -> None:
    speed = report.bytes / report.seconds / 1e6
    for message in report.warnings:
        print(f"{prog}: warning: {message}", file=sys.stderr)
    print(
        f"{verb} {report.folder}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s "
        f"({speed:,.0f} MB/s)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs `jaxgen convert` and `jaxgen verify`, whose options are in `jaxgen.cli.main`."""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from . import Report, convert_checkpoint, convert_to_hugging_face, verify
from .writing import neighbours


def run(arguments: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        if arguments.command == "verify":
            _describe(
                "verified", verify(arguments.folder, follow_links=arguments.follow_links, revision=arguments.revision)
            )
        else:
            report = _convert(arguments)
            _describe("wrote", report)
            print(f"load it with jaxgen.load({str(report.folder)!r})", file=sys.stderr)
    return 0


def _convert(arguments: argparse.Namespace) -> Report:
    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(arguments, name) for name in names}

    shared = given("shard_size", "workers", "overwrite", "resume", "follow_links", "revision")
    one_way = given("dtype", "allow_pickle", "merge_lora")
    if arguments.to_hf and (wrong := [name for name, value in one_way.items() if value]):
        raise ValueError(f"--{wrong[0].replace('_', '-')} cannot be combined with --to-hf")
    try:
        if arguments.to_hf:
            return convert_to_hugging_face(arguments.src, arguments.dst, **shared)
        return convert_checkpoint(arguments.src, arguments.dst, **shared, **one_way)
    except (OSError, KeyboardInterrupt):
        if neighbours(Path(os.path.abspath(arguments.dst)))[0].exists():
            _say("not complete. The same command with --resume continues from here.")
        raise


def _describe(verb: str, report: Report) -> None:
    for message in report.warnings:
        _say(f"warning: {message}")
    speed = report.bytes / report.seconds / 1e6
    print(
        f"{verb} {report.folder}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s "
        f"({speed:,.0f} MB/s)",
        file=sys.stderr,
    )


def _say(message: str) -> None:
    print(f"jaxgen: {message}", file=sys.stderr)

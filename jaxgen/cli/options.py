"""The options of decoding on the command line: the fields of GenerationConfig under their names, and short ones.

Read before JAX is imported, so that help answers at once.
"""

import argparse
import json
from typing import Any, get_args

from jaxgen.generation.fields import FIELDS, SUPPORTED

# What shapes the object that `generate` returns has no place on a command line.
_OPTIONS = {name: FIELDS[name] for name in FIELDS if name in SUPPORTED and FIELDS[name][1].group != "outputs"}
_SAMPLING = {name for name, (_, field) in _OPTIONS.items() if field.group == "sampling"} | {"key"}


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """All of them, under names with hyphens or underscores; what is not given is absent from the result."""
    titles = dict.fromkeys(field.group for _, field in _OPTIONS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    groups["sampling"].description = "each of these implies --do-sample, unless --penalty-alpha is given"
    for name, (kind, field) in _OPTIONS.items():
        names = [f"--{each}" for each in (name.replace("_", "-"), field.alias) if each]
        hidden = [f"--{each[2:].replace('-', '_')}" for each in names if "-" in each[2:]]
        common = {"dest": name, "default": argparse.SUPPRESS, **_reader(kind)}
        groups[field.group].add_argument(*names, help=field.help.replace("`", ""), **common)
        if hidden:
            parser.add_argument(*hidden, help=argparse.SUPPRESS, **common)
    parser.add_argument(
        "--seed",
        dest="key",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="seed of the samples; implies --do-sample",
    )


def _reader(kind: Any) -> dict[str, Any]:
    """How argparse reads values of the type of a field."""
    if kind == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    if kind == int | None:
        return {"type": int, "metavar": "N"}
    if kind == float | None:
        return {"type": float, "metavar": "X"}
    if str in get_args(kind):  # a text or several: the option may be given several times
        return {"action": "append", "metavar": "TEXT"}
    return {"type": _json, "metavar": "JSON"}


def _json(text: str) -> Any:
    """JSON, or a bare word such as `never`."""
    if text.isalpha() and text not in ("true", "false", "null"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error


def decoding_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keywords of `generate`."""
    given = {name: value for name, value in vars(arguments).items() if name in {*_OPTIONS, "key"}}
    if given.get("temperature") == 0:
        if given.get("do_sample"):
            raise ValueError("--temp 0 takes the likeliest token, and --do-sample draws one. Leave out one of them.")
        del given["temperature"]
        return {**given, "do_sample": False}
    if given.keys() & _SAMPLING and "penalty_alpha" not in given:
        return {"do_sample": True, **given}
    return given

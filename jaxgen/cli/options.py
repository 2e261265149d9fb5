"""The decoding options of the command line: the fields of GenerationConfig, by their names and short names.

JAX is not imported here, so that `--help` answers at once.
"""

import argparse
import difflib
import json
from typing import Any, NoReturn, get_args

from jaxgen.generation.config.fields import FIELDS, SUPPORTED

Arguments = dict[str, Any]  # keywords of `generate`

# Fields that only change which outputs `generate` returns have no option.
_OPTIONS = {name: FIELDS[name] for name in FIELDS if name in SUPPORTED and FIELDS[name][1].group != "outputs"}
OPTION_NAMES = tuple(_OPTIONS)
_SAMPLING = {name for name, (_, field) in _OPTIONS.items() if field.group == "sampling"} | {"key"}


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Adds all decoding options, with hyphens or underscores. Options that are not given set no attribute."""
    titles = dict.fromkeys(field.group for _, field in _OPTIONS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    groups["sampling"].description = "each of these implies --do-sample, unless --penalty-alpha is given"
    for name, (kind, field) in _OPTIONS.items():
        names = [f"--{option}" for option in (name.replace("_", "-"), field.alias) if option]
        hidden = [f"--{option[2:].replace('-', '_')}" for option in names if "-" in option[2:]]
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
        help="random seed; implies --do-sample",
    )


def _reader(kind: object) -> dict[str, Any]:
    """The arguments of `add_argument` with which it reads values of a field's type."""
    if kind == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    if kind == int | None:
        return {"type": int, "metavar": "N"}
    if kind == float | None:
        return {"type": float, "metavar": "X"}
    if str in get_args(kind):  # one text or several: the option may be repeated
        return {"action": "append", "metavar": "TEXT"}
    return {"type": _json, "metavar": "JSON"}


def _json(text: str) -> object:
    """The value of a text in JSON, or a bare word such as `never`."""
    if text.isalpha() and text not in ("true", "false", "null"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON ({error})") from error


def decoding_arguments(arguments: argparse.Namespace) -> Arguments:
    """The decoding options that were given, as keywords of `generate`."""
    given = {name: value for name, value in vars(arguments).items() if name in {*_OPTIONS, "key"}}
    if given.get("temperature") == 0:
        if given.get("do_sample"):
            raise ValueError("--temp 0 takes the most likely token, but --do-sample samples. Leave out one of them.")
        del given["temperature"]
        return {**given, "do_sample": False}
    if given.keys() & _SAMPLING and "penalty_alpha" not in given:
        return {"do_sample": True, **given}
    return given


def option_name(name: str) -> str:
    """The keyword of `generate` that an option sets, from any of its names, with or without the leading hyphens.

    Raises:
        ValueError: if there is no such option.
    """
    names = {option: option for option in _OPTIONS} | {"seed": "key"}
    names |= {field.alias.replace("-", "_"): option for option, (_, field) in _OPTIONS.items() if field.alias}
    bare = name.removeprefix("--").replace("-", "_")
    if bare not in names:
        close = difflib.get_close_matches(bare, names, n=1)
        raise ValueError(f"there is no decoding option {name!r}." + "".join(f" Did you mean {each}?" for each in close))
    return names[bare]


def read_option(name: str, text: str) -> Arguments:
    """The value of one decoding option, as the command line reads it before `decoding_arguments`.

    Args:
        name: any of its names, with or without the leading hyphens.
        text: its value; true or false for an option without a value.

    Raises:
        ValueError: if there is no such option, or the value is not of its type.
    """
    option = "seed" if (keyword := option_name(name)) == "key" else keyword.replace("_", "-")
    line = f"--{option}={text}"
    if keyword in _OPTIONS and _OPTIONS[keyword][0] == bool | None:
        if text not in ("true", "false"):
            raise ValueError(f"{keyword} is true or false, not {text!r}.")
        line = f"--{option}" if text == "true" else f"--no-{option}"
    parser = _RaisingParser(add_help=False, allow_abbrev=False)
    add_decoding_options(parser)
    return vars(parser.parse_args([line]))


class _RaisingParser(argparse.ArgumentParser):
    """A parser whose errors do not end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

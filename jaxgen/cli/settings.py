"""The decoding options of `jaxgen chat`: they begin as those of the command line, and `/set` changes them."""

import argparse
import json
from typing import TYPE_CHECKING

from jaxgen.chat import APART
from jaxgen.cli.options import OPTION_NAMES, Arguments, decoding_arguments, option_name, read_option
from jaxgen.generation.config.resolve import resolve

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

_NEW_TOKENS = 256  # as in `transformers chat`


def chat_arguments(options: argparse.Namespace) -> Arguments:
    """The decoding options as keywords of `generate`; raises ValueError if a chat cannot use one of them."""
    given = decoding_arguments(options)
    if given.get("num_beams", 1) > 1 or given.get("num_return_sequences", 1) > 1:
        raise ValueError("a chat shows one answer, token by token. Leave out `num_beams` and `num_return_sequences`.")
    for name in APART:
        if name in given:
            raise ValueError(f"a chat continues its cache, which cannot be combined with `{name}`. Leave it out.")
    return given


class Settings:
    """The options of a chat, combined with those of the checkpoint.

    Attributes:
        arguments: keywords of `generate`. Where neither the checkpoint nor the user says otherwise, answers are sampled
            and have up to 256 tokens, as in `transformers chat`.
    """

    def __init__(self, config: "GenerationConfig", options: argparse.Namespace):
        """
        Args:
            config: the checkpoint's.
            options: the decoding options that were given, as the command line reads them.

        Raises:
            ValueError: if a chat cannot use one of them.
        """
        self._config, self._options = config, options
        self._given = given = chat_arguments(options)
        self.arguments: Arguments = dict(given)
        if config.do_sample is None:
            self.arguments.setdefault("do_sample", True)
        if config.max_new_tokens is None and "max_length" not in given:
            self.arguments.setdefault("max_new_tokens", _NEW_TOKENS)

    def changed(self, name: str, text: str) -> "Settings":
        """The settings with one option changed.

        Args:
            name: as on the command line, with or without the hyphens.
            text: its value, or "default" to undo a change.

        Raises:
            ValueError: if there is no such option, or the value is not of its type.
        """
        options = dict(vars(self._options))
        if text == "default":
            options.pop(option_name(name), None)
        else:
            options |= read_option(name, text)
        return Settings(self._config, argparse.Namespace(**options))

    def describe(self) -> str:
        """All options that are set, one per line, and the names of the others."""
        merged = resolve(self._config, None, self._fields)[0].merged
        values = {name: getattr(merged, name) for name in OPTION_NAMES} | {"seed": self.arguments.get("key")}
        lines = []
        for name, value in values.items():
            if value is None:
                continue
            given = ("key" if name == "seed" else name) in self._given
            source = (
                " (yours)" if given else " (the checkpoint's)" if getattr(self._config, name, None) is not None else ""
            )
            lines.append(f"{name} {json.dumps(value, default=str)}{source}")
        return "\n".join([*lines, f"not set: {', '.join(name for name, value in values.items() if value is None)}"])

    def manner(self) -> str:
        """How tokens are chosen, for the first line of a chat."""
        resolved = resolve(self._config, None, self._fields)[0]
        if not resolved.do_sample:
            return "answers take the most likely token at each step (greedy); --do-sample samples instead"
        numbers = {name: getattr(resolved.merged, name) for name in ("temperature", "top_k", "top_p")}
        shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if value is not None)
        return f"answers are sampled ({shown}); --temp 0 takes the most likely token at each step"

    @property
    def _fields(self) -> Arguments:
        """The arguments that are fields of a GenerationConfig."""
        return {name: value for name, value in self.arguments.items() if name != "key"}

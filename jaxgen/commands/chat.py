"""`jaxgen chat`: a conversation in the terminal."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxgen import lazy
from jaxgen.chat import APART, Conversation
from jaxgen.commands.options import decoding_arguments
from jaxgen.commands.terminal import checked_text, decode, open_model, say
from jaxgen.generation import Call

_NEW_TOKENS = 512
_HELP = """/reset        forget the conversation
/system TEXT  set the system message; without TEXT remove it
/save FILE    write the messages as JSON
/help         show this
/exit         leave, as Ctrl-D does
//TEXT        a message that begins with a slash
Ctrl-C stops an answer."""


def run(arguments: argparse.Namespace) -> int:
    template = Path(arguments.chat_template).read_text(encoding="utf-8") if arguments.chat_template else None
    given = decoding_arguments(arguments)
    if "max_length" not in given:
        given = {"max_new_tokens": _NEW_TOKENS, **given}
    if given.get("num_beams", 1) > 1 or given.get("num_return_sequences", 1) > 1:
        raise ValueError("a chat shows one answer as it comes. Leave out `num_beams` and `num_return_sequences`.")
    for name in APART:
        if name in given:
            raise ValueError(f"a chat goes on from its cache, with which `{name}` does not go. Leave it out.")
    model, tokenizer = open_model(arguments)
    chat = _Chat(Conversation(model, tokenizer, arguments.system, template), tokenizer, given)
    with contextlib.suppress(ImportError):  # what makes `input` editable, where there is one
        import readline  # noqa: F401
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        say("type a message, or /help; the first answers compile")
        while (line := _read()) is not None:
            if line.split(maxsplit=1)[:1] == ["/exit"]:
                break
            chat.take(line)
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def _read() -> str | None:
    """The next line, None at the end."""
    while sys.stdin is not None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D to leave)")
    return None


class _Chat:
    """Takes lines: messages to the model, and commands."""

    def __init__(self, conversation: Conversation, tokenizer: Any, arguments: dict[str, Any]):
        self._conversation, self._tokenizer, self._arguments = conversation, tokenizer, arguments
        self._asked = 0

    def take(self, line: str) -> None:
        """Does what a line says; what goes wrong is said, and the conversation goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                print(self._command(*line.split(maxsplit=1)))
            elif line:
                self._answer(checked_text(line.removeprefix("/"), "the message"))
        except KeyboardInterrupt:
            print("\n(dropped)")
        except OSError as error:
            say(f"{error.filename}: {error.strerror}")
        except ValueError as error:
            say(str(error))

    def _command(self, name: str, text: str = "") -> str:
        if name == "/reset":
            self._conversation.reset()
            return "(forgotten)"
        if name == "/system":
            self._conversation.system = text or None
            return "(set)" if text else "(removed)"
        if name == "/save":
            if not text:
                raise ValueError("/save needs the name of a file.")
            path = Path(text).expanduser()
            with path.open("x", encoding="utf-8") as file:  # never over another file
                json.dump({"messages": self._conversation.messages}, file, ensure_ascii=False, indent=1)
            return f"(saved in {path})"
        return _HELP if name == "/help" else f"There is no {name}.\n{_HELP}"

    def _answer(self, text: str) -> None:
        arguments, taken = dict(self._arguments), []
        if "key" in arguments:  # or asking again would draw the same again
            arguments["key"] = jax.random.fold_in(jax.random.key(arguments["key"]), self._asked)
        self._asked += 1
        with _interruptible() as interrupted:

            def run_call(call: Call) -> tuple[Any, int]:
                streamer = lazy.transformers().TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
                output, times = decode(self._conversation.model, call, streamer, interrupted)
                taken.append(times)
                return output, times.shown

            turn = self._conversation.ask(text, arguments, run_call)
        (times,) = taken
        context = self._conversation.model.max_position_embeddings
        notes = [
            f"{turn.read} tokens read, {turn.kept} kept, {len(turn.tokens)} written, {times.rate:,.0f} tokens/s",
            f"{times.shown:,} of {context:,} tokens used" + (", /reset to forget" if times.shown > context else ""),
            *([f"compiled for {times.compiling:.1f} s"] if times.compiling > 0.1 else []),
            *(["stopped"] if interrupted() else []),
        ]
        print(f"[{'; '.join(notes)}]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile; a second time it raises, for what does not look."""
    pressed: list[int] = []

    def press(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(1)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)

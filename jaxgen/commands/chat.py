"""`jaxgen chat`: a conversation in the terminal."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxgen import lazy
from jaxgen.chat import Conversation
from jaxgen.commands.options import decoding_arguments
from jaxgen.commands.terminal import Times, decode, open_model, say
from jaxgen.generation import Call

_NEW_TOKENS = 512
_HELP = """/reset        forget the conversation
/system TEXT  set the system message; without TEXT remove it
/save FILE    write the messages as JSON
/help         show this
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer."""


def run(arguments: argparse.Namespace) -> int:
    template = Path(arguments.chat_template).read_text(encoding="utf-8") if arguments.chat_template else None
    model, tokenizer = open_model(arguments)
    given = decoding_arguments(arguments)
    if "max_length" not in given:
        given = {"max_new_tokens": _NEW_TOKENS, **given}
    if given.get("num_beams", 1) > 1 or given.get("num_return_sequences", 1) > 1:
        raise ValueError("a chat shows one answer as it comes. Leave out `num_beams` and `num_return_sequences`.")
    conversation = Conversation(model, tokenizer, arguments.system, template)
    with contextlib.suppress(ImportError):  # what makes `input` editable, where there is one
        import readline  # noqa: F401
    say("type a message, or /help; the first answers compile")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D to leave)")
            continue
        if line == "/exit":
            return 0
        try:
            if line.startswith("/"):
                print(_command(conversation, *line.split(maxsplit=1)))
            elif line:
                _answer(conversation, tokenizer, line, given)
        except KeyboardInterrupt:
            print("\n(dropped)")
        except (ValueError, OSError) as error:
            say(str(error))


def _command(conversation: Conversation, name: str, text: str = "") -> str:
    if name == "/reset":
        conversation.reset()
        return "(forgotten)"
    if name == "/system":
        conversation.system = text or None
        return "(set)" if text else "(removed)"
    if name == "/save":
        if not text:
            raise ValueError("/save needs the name of a file.")
        with open(text, "x", encoding="utf-8") as file:  # never over another file
            json.dump({"messages": conversation.messages}, file, ensure_ascii=False, indent=1)
        return f"(saved in {text})"
    return _HELP if name == "/help" else f"There is no {name}.\n{_HELP}"


def _answer(conversation: Conversation, tokenizer: Any, text: str, given: dict[str, Any]) -> None:
    taken: list[Times] = []
    with _interruptible() as interrupted:

        def run_call(call: Call) -> tuple[Any, int]:
            streamer = lazy.transformers().TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            output, times = decode(conversation.model, call, streamer, interrupted)
            taken.append(times)
            return output, times.shown

        turn = conversation.ask(text, given, run_call)
    (times,) = taken
    rate = len(turn.tokens) / max(times.total - times.compiling, 1e-9)
    compiled = f", compiled for {times.compiling:.1f} s" if times.compiling > 0.1 else ""
    note = f"{turn.read} tokens read, {turn.kept} kept, {len(turn.tokens)} written, {rate:,.0f} tokens/s{compiled}"
    print(f"[{note}{', stopped' if interrupted() else ''}]", file=sys.stderr, flush=True)


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

"""`jaxgen chat`: a conversation in the terminal."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxgen.chat import APART, Conversation
from jaxgen.cli.options import Arguments, decoding_arguments
from jaxgen.cli.terminal import Times, checked_text, decode, open_model, say
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.config.resolve import resolve
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.text_stream import TextPieces

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig, PreTrainedTokenizerBase

_NEW_TOKENS = 256  # as in `transformers chat`
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
    if given.get("num_beams", 1) > 1 or given.get("num_return_sequences", 1) > 1:
        raise ValueError("a chat shows one answer, token by token. Leave out `num_beams` and `num_return_sequences`.")
    for name in APART:
        if name in given:
            raise ValueError(f"a chat continues its cache, which cannot be combined with `{name}`. Leave it out.")
    model, tokenizer = open_model(arguments)
    given = {**_defaults(model.generation_config, given), **given}
    conversation = Conversation(model, tokenizer, arguments.system, template)
    with contextlib.suppress(ImportError):  # its import makes `input` editable
        import readline  # noqa: F401
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A compilation cannot be interrupted. In a thread of its own it continues while the user types.
    with ThreadPoolExecutor(max_workers=1) as worker:
        chat = _Chat(conversation, tokenizer, given, worker)
        try:
            say(f"type a message, or /help; {_manner(model.generation_config, given)}")
            while (line := _read()) is not None:
                if line.split(maxsplit=1)[:1] == ["/exit"]:
                    break
                chat.take(line)
        finally:
            signal.signal(signal.SIGINT, before)
            if chat.busy:
                say("waiting for the compiler; Ctrl-C leaves now")
    return 0


def _defaults(config: "GenerationConfig", given: Arguments) -> Arguments:
    """Sampling, up to 256 tokens, as in `transformers chat`, where neither the checkpoint nor the user sets it."""
    defaults: Arguments = {}
    if config.do_sample is None:
        defaults["do_sample"] = True
    if config.max_new_tokens is None and "max_length" not in given:
        defaults["max_new_tokens"] = _NEW_TOKENS
    return defaults


def _manner(config: "GenerationConfig", given: Arguments) -> str:
    """How tokens are chosen, for the first line."""
    fields = {name: value for name, value in given.items() if name != "key"}
    resolved = resolve(config, None, fields)[0]
    if not resolved.do_sample:
        return "answers take the most likely token at each step (greedy); --do-sample samples instead"
    numbers = {name: getattr(resolved.merged, name) for name in ("temperature", "top_k", "top_p")}
    shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if value is not None)
    return f"answers are sampled ({shown}); --temp 0 takes the most likely token at each step"


def _read() -> str | None:
    """The next line of the user; None at the end of the input."""
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
    """Handles the lines of the user: messages to the model, and commands."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: "PreTrainedTokenizerBase",
        arguments: Arguments,
        worker: ThreadPoolExecutor,
    ):
        self._conversation, self._tokenizer, self._arguments = conversation, tokenizer, arguments
        self._asked, self._worker = 0, worker
        self._last: Future[tuple[GenerateOutput, Times]] | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer that was dropped is still being computed."""
        return self._last is not None and not self._last.done()

    def take(self, line: str) -> None:
        """Handles a line. Errors are printed, and the conversation goes on."""
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
            with path.open("x", encoding="utf-8") as file:  # "x" never overwrites a file
                json.dump({"messages": self._conversation.messages}, file, ensure_ascii=False, indent=1)
            return f"(saved in {path})"
        return _HELP if name == "/help" else f"There is no {name}.\n{_HELP}"

    def _answer(self, text: str) -> None:
        arguments, taken = dict(self._arguments), []
        if "key" in arguments:  # or the same question would always get the same answer
            arguments["key"] = jax.random.fold_in(jax.random.key(arguments["key"]), self._asked)
        self._asked += 1
        screen = _Screen(self._tokenizer)
        with _interruptible(screen) as interrupted:

            def run_call(prepared: PreparedCall) -> tuple[GenerateOutput, int]:
                if self.busy:  # the one worker still compiles for an answer that was dropped
                    screen.compiling()
                model = self._conversation.model
                self._last = self._worker.submit(decode, model, prepared, screen.show, interrupted, screen.compiling)
                output, times = self._last.result()
                taken.append(times)
                return output, times.shown

            try:
                turn = self._conversation.ask(text, arguments, run_call)
            finally:
                screen.close()
            screen.end()
        (times,) = taken
        context = self._conversation.model.max_position_embeddings
        notes = [
            f"{turn.read} tokens read, {turn.kept} kept, {len(turn.tokens)} written, {times.rate:,.0f} tokens/s",
            f"{times.shown:,} of {context:,} tokens used" + (", /reset to forget" if times.shown > context else ""),
            *([f"compiled for {times.compiling:.1f} s"] if times.compiling > 0.1 else []),
            *(["stopped"] if interrupted() else []),
        ]
        print(f"[{'; '.join(notes)}]", file=sys.stderr, flush=True)


class _Screen:
    """Shows an answer as it comes, and until then a note that programs are compiled."""

    _NOTE = "compiling, the first answer takes a while ..."

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._pieces = TextPieces(tokenizer)
        self._waiting: list[int] = []
        self._noted, self._looks, self._ended = False, 0, False

    @property
    def begun(self) -> bool:
        """Whether tokens arrive steadily: the first one comes before the program of the others is compiled."""
        return self._looks > 1

    def compiling(self) -> None:
        """Shows the note, in a terminal; it stays until `begun`."""
        if not self._looks and not self._noted and not self._ended and sys.stderr.isatty():
            self._noted = True
            print(self._NOTE, end="", file=sys.stderr, flush=True)

    def show(self, ids: np.ndarray) -> None:
        """Shows the text of new token ids, int [T]; nothing after `close`."""
        self._looks += 1
        self._waiting += ids.tolist()
        # The first token stays behind the note until the others follow.
        if self._ended or (self._noted and not self.begun):
            return
        self._clear()
        piece, self._waiting = self._pieces.add(self._waiting), []
        print(piece, end="", flush=True)

    def close(self) -> None:
        """Stops showing anything, even if the answer is still being computed."""
        self._ended = True
        self._clear()

    def end(self) -> None:
        """Shows the rest of an answer that was not dropped."""
        print(self._pieces.add(self._waiting) + self._pieces.end(), flush=True)

    def _clear(self) -> None:
        if self._noted:
            self._noted = False
            print(f"\r{' ' * len(self._NOTE)}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruptible(screen: _Screen) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed. Before the answer has begun, or twice, it raises."""
    pressed: list[int] = []

    def press(*_: object) -> None:
        pressed.append(1)
        if len(pressed) > 1 or not screen.begun:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)

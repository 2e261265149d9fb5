"""`jaxgen chat`: a conversation in the terminal."""

import argparse
import json
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxgen.chat import Conversation, Message, read_messages
from jaxgen.cli.keyboard import Keyboard
from jaxgen.cli.screen import COMPILING, Screen, interruptible
from jaxgen.cli.settings import Settings, chat_arguments
from jaxgen.cli.terminal import Times, checked_text, counted, decode, open_assistant, open_model, say
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.outputs import GenerateOutput

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase

_HELP = '''/set             show the decoding options in force
/set NAME VALUE  change one, such as /set temperature 0.7; the VALUE default undoes the change
/retry           answer the last message again
/undo            forget the last message and its answer
/reset           forget the conversation; also /clear
/system TEXT     set the system message; without TEXT remove it
/save FILE       write the messages as JSON
/load FILE       continue the messages of a JSON file
/help            show this; also /?
/exit            leave, as Ctrl-D does; also /bye
//TEXT           a message that begins with a slash
"""              begins and ends a message of several lines
Ctrl-C stops an answer. The arrow keys and Ctrl-R bring back earlier lines.'''
_ALIASES = {"/clear": "/reset", "/?": "/help", "/bye": "/exit"}


def run(arguments: argparse.Namespace) -> int:
    template = Path(arguments.chat_template).read_text(encoding="utf-8") if arguments.chat_template else None
    chat_arguments(arguments)  # before the model is loaded
    messages = [] if arguments.load is None else _loaded(arguments.load)
    model, tokenizer = open_model(arguments)
    settings = Settings(model.generation_config, arguments)
    assistant, own = open_assistant(arguments, model, tokenizer)
    conversation = Conversation(model, tokenizer, template=template, assistant_model=assistant, assistant_tokenizer=own)
    conversation.messages = messages
    if arguments.system is not None:
        conversation.system = arguments.system
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A compilation cannot be interrupted. In a thread of its own it continues while the user types.
    with ThreadPoolExecutor(max_workers=1) as worker:
        chat = _Chat(conversation, tokenizer, settings, worker)
        try:
            say(f"type a message, or /help; {settings.manner()}")
            if arguments.load is not None:
                say(_described(messages))
            chat.read_ahead()
            keyboard = Keyboard()
            while (line := keyboard.read()) is not None:
                command, *_ = line.split(maxsplit=1) or [""]
                if _ALIASES.get(command, command) == "/exit":
                    break
                chat.take(line)
        finally:
            signal.signal(signal.SIGINT, before)
            chat.leaving = True
            if chat.busy:
                say("waiting for the compiler; Ctrl-C leaves now")
    return 0


def _loaded(name: str) -> list[Message]:
    return read_messages(Path(name).expanduser())


def _described(messages: list[Message]) -> str:
    """How many messages were loaded, and what to do if the last one has no answer yet."""
    open_question = bool(messages) and messages[-1]["role"] == "user"
    return f"{counted(len(messages), 'message')} loaded" + ("; /retry answers the last one" if open_question else "")


class _Chat:
    """Handles the user's lines: messages for the model, and commands.

    Attributes:
        leaving: set at the end, to stop reading ahead.
    """

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: "PreTrainedTokenizerBase",
        settings: Settings,
        worker: ThreadPoolExecutor,
    ):
        self._conversation, self._tokenizer, self._settings = conversation, tokenizer, settings
        self._asked, self._worker, self.leaving = 0, worker, False
        self._last: Future[tuple[GenerateOutput, Times]] | None = None
        self._ahead: Future[tuple[GenerateOutput, Times]] | None = None
        self._work = ""  # what the worker is doing, for the note

    @property
    def busy(self) -> bool:
        """Whether the worker is still computing something that nobody waits for."""
        return self._last is not None and not self._last.done()

    def read_ahead(self) -> None:
        """Prefills the messages so far while the user types the next one, which also prepares the programs for it."""
        if sys.stdin is None or not sys.stdin.isatty():
            return
        looks: list[object] = []

        def stop() -> bool:
            return self.leaving or len(looks) > 1  # the second program has run

        def compiling() -> None:
            self._work = COMPILING

        try:
            prepared = self._conversation.prepare(self._settings.arguments)
        except ValueError as error:  # each answer would fail in the same way
            say(str(error))
            return
        self._work = "reading the conversation ..."
        self._ahead = self._last = self._worker.submit(decode, prepared, looks.append, stop, compiling)

    def take(self, line: str) -> None:
        """Handles a line. Errors are printed, and the conversation continues."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(*line.split(maxsplit=1))
            elif line:
                self._answer(checked_text(line.removeprefix("/"), "the message"))
        except KeyboardInterrupt:
            print("\n(dropped)")
        except OSError as error:
            say(f"{error.filename}: {error.strerror}")
        except ValueError as error:
            say(str(error))

    def _command(self, name: str, text: str = "") -> None:
        conversation, name = self._conversation, _ALIASES.get(name, name)
        if name in ("/save", "/load") and not text:
            raise ValueError(f"{name} needs the name of a file.")
        if name == "/retry":
            return self._answer(None)
        if name == "/undo":
            print(f"(forgotten: {conversation.undo()})")
        elif name == "/reset":
            conversation.reset()
            print("(forgotten)")
        elif name == "/system":
            conversation.system = checked_text(text, "the message") or None
            print("(set)" if text else "(removed)")
        elif name == "/set":
            print(self._set(*text.split(maxsplit=1)))
        elif name == "/save":
            path = Path(text).expanduser()
            with path.open("x", encoding="utf-8") as file:  # "x" never overwrites a file
                json.dump({"messages": conversation.messages}, file, ensure_ascii=False, indent=1)
            print(f"(saved in {path})")
        elif name == "/load":
            conversation.messages = _loaded(text)
            print(f"({_described(conversation.messages)})")
            self.read_ahead()
        else:
            print(_HELP if name == "/help" else f"There is no {name}.\n{_HELP}")

    def _set(self, name: str = "", text: str = "") -> str:
        """Changes an option, or describes them all."""
        if not name:
            return self._settings.describe()
        if not text:
            raise ValueError(f"/set {name} needs a value; `default` takes a change back, and /set alone shows all.")
        changed = self._settings.changed(name, checked_text(text, "the value"))
        self._conversation.prepare(changed.arguments)  # which checks the values
        self._settings = changed
        return f"({name} {text}; {changed.manner().partition(';')[0]})"

    def _answer(self, text: str | None) -> None:
        """Asks a question, or the last one again, and shows the answer."""
        conversation, arguments = self._conversation, dict(self._settings.arguments)
        if "key" in arguments:  # or the same question would always get the same answer
            arguments["key"] = jax.random.fold_in(jax.random.key(arguments["key"]), self._asked)
        self._asked += 1
        screen, taken = Screen(self._tokenizer), list[Times]()
        with interruptible(screen) as interrupted:

            def compiling() -> None:
                self._work = COMPILING
                screen.note(COMPILING)

            def run_call(prepared: PreparedCall) -> tuple[GenerateOutput, int]:
                # The only worker may still be busy with a dropped answer.
                screen.note(self._work if self.busy else "reading the prompt ...")
                submit = self._worker.submit
                self._last = submit(decode, prepared, screen.show, interrupted, compiling)
                output, times = self._last.result()
                taken.append(times)
                return output, times.shown

            try:
                self._take_ahead(screen)
                if text is None:
                    turn = conversation.retry(arguments, run_call)
                else:
                    turn = conversation.ask(text, arguments, run_call)
            finally:
                screen.close()
            screen.end()
        (times,) = taken
        context = conversation.model.max_position_embeddings
        notes = [
            f"{turn.read} tokens read, {turn.kept} kept, {len(turn.tokens)} written, {times.rate:,.0f} tokens/s",
            f"{times.shown:,} of {context:,} tokens used" + (", /reset to forget" if times.shown > context else ""),
            *([times.note] if times.note else []),
            *([f"compiled for {times.compiling:.1f} s"] if times.compiling > 0.1 else []),
            *(["stopped"] if interrupted() else []),
        ]
        print(f"[{'; '.join(notes)}]", file=sys.stderr, flush=True)

    def _take_ahead(self, screen: Screen) -> None:
        """Waits for `read_ahead` to finish, and keeps its cache."""
        if self._ahead is None:
            return
        if not self._ahead.done():
            screen.note(self._work)
        failed = self._ahead.exception()  # an answer would fail in the same way, and report it
        screen.note("")
        ahead, self._ahead = self._ahead, None
        if failed is None:
            output, times = ahead.result()
            self._conversation.keep(output, times.shown)

"""`jaxgen chat` in a terminal: a person types, reads along, stops an answer and leaves."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgen.cli import chat as chat_command
from jaxgen.cli.main import main


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *command: str):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.screen = ""

    def wait_for(self, pattern: str, seconds: float = 600) -> str:
        """What is on the screen up to the end of the pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {pattern!r} in vain; the screen: {self.screen!r}"
            try:
                self.screen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the program has left
                assert re.search(pattern, self.screen), self.screen
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def wait_until_it_waits(self) -> None:
        """For a key, which Linux calls sleeping."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.exists() and state.read_text().rpartition(") ")[2][0] != "S":
            os.sched_yield()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    """Makes standard input the terminal that sends the signals."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def chat(chat_folder: Path) -> Iterator[Terminal]:
    options = ["--model", str(chat_folder), "--max-tokens", "2000", "--eos-token-id", "1000", "--system", "be kind"]
    terminal = Terminal(sys.executable, "-m", "jaxgen", "chat", *options)
    yield terminal
    terminal.close()


def test_a_person_talks_stops_an_answer_talks_on_and_leaves(chat: Terminal, tmp_path: Path) -> None:
    chat.wait_for("> ")
    chat.type("hello there\n")
    chat.wait_for(r"to avoid it\.\r\n")  # a warning about the length
    chat.wait_for(r"compiling, the first answer takes a while \.\.\.\r +\r")
    chat.wait_for(r"\w+ \w+ \w+ ")  # the answer has begun, and would go on for thousands of tokens
    chat.type("\x03")
    note = chat.wait_for(r"\[(\d+) tokens read, 0 kept, (\d+) written.*stopped\]\r\n")
    written = int(re.search(r"(\d+) written", note)[1])  # type: ignore[index]
    assert 0 < written < 1900
    chat.wait_for("> ")
    chat.wait_until_it_waits()  # readline misses a signal that comes between its prompt and its waiting for a key
    chat.type("\x03")
    chat.wait_for("to leave")
    chat.type("and then\n")
    chat.wait_for(r"to avoid it\.\r\n")
    assert "compiling" not in chat.wait_for(r"\w+ \w+ \w+ ")
    chat.type("\x03")
    kept = re.search(r"(\d+) kept", chat.wait_for(r"kept.*stopped\]\r\n"))
    assert kept and int(kept[1]) > 5
    chat.wait_for("> ")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("saved in")
    roles = [message["role"] for message in json.loads((tmp_path / "talk.json").read_text())["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    chat.wait_for("> ")
    chat.type("/exit\n")
    assert chat.process.wait() == 0


def test_an_interrupt_while_it_compiles_gives_the_prompt_back_at_once(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events, asked_again, decodes = [], threading.Event(), []

    def decode(model: Any, call: Any, show: Any, stop: Any, on_compile: Any) -> Any:
        decodes.append(call)
        if len(decodes) == 1:
            on_compile()
            os.kill(os.getpid(), signal.SIGINT)
            assert asked_again.wait(60)  # the compiler is still at work when the person types again
            events.append("compiled")
            assert stop()
            show(np.array([5, 6, 7]))
        return chat_command.decode_for_real(model, call, show, stop, on_compile)

    class Keyboard(io.StringIO):
        def readline(self, *_: Any) -> str:
            line = super().readline()
            if line == "again\n":
                events.append("prompt")
                asked_again.set()
            return line

    monkeypatch.setattr(chat_command, "decode_for_real", chat_command.decode, raising=False)
    monkeypatch.setattr(chat_command, "decode", decode)
    monkeypatch.setattr(sys, "stdin", Keyboard("hello there\nagain\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5", "--min-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert events == ["prompt", "compiled"]
    before, after = out.split("(dropped)\n")
    assert not before.strip() and after.strip()  # nothing of the answer that was dropped
    assert "compiling, the first answer takes a while" in err and "0 kept, 5 written" in err


def piped(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_lines_from_a_pipe_are_answered_one_by_one(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    saved.write_text("mine")
    piped(monkeypatch, ["hello there", "/system be a fox", "/reset", "/what", f"/save {saved}", "/save", "", "/system"])
    assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    for said in ("(set)", "(forgotten)", "There is no /what", "/exit", "(removed)"):
        assert said in out
    assert "0 kept, 5 written" in err and "File exists" in err and "/save needs the name of a file" in err
    assert saved.read_text() == "mine"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for %}", "{{ 1 / 0 }}", "{{ 1 + 'a' }}", "{# #}"], ids=str
)
def test_a_template_that_fails_is_reported_and_the_chat_goes_on(
    template: str,
    chat_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "template").write_text(template)
    piped(monkeypatch, ["hello there", "/help"])
    assert main(["chat", "--model", str(chat_folder), "--chat-template", str(tmp_path / "template")]) == 0
    out, err = capsys.readouterr()
    assert "the chat template" in err and "/reset" in out


def test_what_is_no_utf_8_is_reported_and_two_slashes_begin_a_message(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, ["\udcff", "//etc is a folder"])
    assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5"]) == 0
    err = capsys.readouterr().err
    assert "the message is not UTF-8 (byte 0xff)" in err and "5 written" in err


def test_a_seed_draws_another_answer_in_another_turn(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for _ in range(2):
        piped(monkeypatch, ["hello there", "/reset", "hello there"])
        assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5", "--seed", "1", "--temp", "3"]) == 0
        answers.append(capsys.readouterr().out.split("(forgotten)"))
    assert answers[0] == answers[1] and answers[0][0].strip() != answers[0][1].strip()


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({}, [], "answers are sampled (temperature 1, top_k 50, top_p 1)"),
        ({}, ["--temp", "0.7"], "answers are sampled (temperature 0.7, top_k 50, top_p 1)"),
        ({}, ["--temp", "0"], "greedy"),
        ({"do_sample": False}, [], "greedy"),
        ({"do_sample": False}, ["--do-sample"], "answers are sampled"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, [], "(temperature 0.6, top_k 50, top_p 0.9)"),
        ({"temperature": 0.6}, ["--top-k", "5"], "(temperature 0.6, top_k 5, top_p 1)"),
    ],
    ids=str,
)
def test_answers_are_sampled_unless_the_checkpoint_or_the_person_says_otherwise(
    settings: dict[str, Any],
    options: list[str],
    said: str,
    chat_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_new_tokens": 5, **settings}))
    calls = []

    def decode(model: Any, call: Any, *_: Any) -> Any:
        calls.append(call)
        raise ValueError("seen")

    monkeypatch.setattr(chat_command, "decode", decode)
    piped(monkeypatch, ["hello there"])
    assert main(["chat", "--model", str(folder), *options]) == 0
    first, *_ = (line for line in capsys.readouterr().err.splitlines() if "/help" in line)
    assert said in first
    (call,) = calls
    assert call.config.do_sample == ("sampled" in said or "top_k" in said) and call.config.max_new_tokens == 5


def test_an_answer_has_256_tokens_at_most_by_default(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, ["hello there"])
    assert main(["chat", "--model", str(chat_folder), "--eos-token-id", "1000", "--temp", "0"]) == 0
    assert "256 written" in capsys.readouterr().err


def test_a_wrong_argument_is_reported_and_the_chat_goes_on(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, ["hello there", "/help"])
    assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5", "--min-p", "7"]) == 0
    out, err = capsys.readouterr()
    assert "`min_p`" in err and "/reset" in out


def test_beams_and_models_without_a_template_are_refused(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["chat", "--model", str(chat_folder), "--num-beams", "2"]) == 1
    assert "a chat shows one answer" in capsys.readouterr().err
    for option in (["--guidance-scale", "2"], ["--penalty-alpha", "0.6", "--top-k", "4"], ["--no-use-cache"]):
        assert main(["chat", "--model", str(chat_folder), *option]) == 1
        assert "a chat continues its cache" in capsys.readouterr().err
    assert main(["chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    template = chat_folder / "chat_template.jinja"
    piped(monkeypatch, [])
    assert main(["chat", "--chat-template", str(template)]) == 0

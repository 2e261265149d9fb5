"""`jaxgen chat` in a terminal: a person types, reads along, stops an answer and leaves."""

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminals import Terminal

import jaxgen
from jaxgen.cli import chat as chat_command
from jaxgen.cli.main import main


@pytest.fixture
def chat(chat_folder: Path) -> Iterator[Terminal]:
    options = ["--model", str(chat_folder), "--max-tokens", "2000", "--eos-token-id", "1000", "--system", "be kind"]
    terminal = Terminal(sys.executable, "-m", "jaxgen", "chat", *options)
    yield terminal
    terminal.close()


def test_a_person_talks_stops_an_answer_talks_on_and_leaves(chat: Terminal, tmp_path: Path) -> None:
    chat.wait_for(r"loading the program \.\.\.\r +\r")
    chat.wait_for(r"loading the model \.\.\.\r +\r")
    chat.wait_for("> ")
    chat.type("hello there\n")
    chat.wait_for(r"to avoid it\.\r\n")  # a warning about the length
    chat.wait_for(r"reading the prompt \.\.\.\r +\r")
    chat.wait_for(r"\w+ \w+ \w+ ")  # the answer has begun, and would go on for thousands of tokens
    chat.type("\x03")
    note = chat.wait_for(r"\[\d+ tokens read, \d+ kept, \d+ written.*stopped\]\r\n")
    kept, written = map(int, re.search(r"(\d+) kept, (\d+) written", note).groups())  # type: ignore[union-attr]
    assert 0 < written < 1900 and kept > 3  # the system message was read before the person typed
    assert "compiled" not in note
    chat.wait_for("> ")
    chat.wait_until_it_waits()  # readline misses a signal that comes between its prompt and its waiting for a key
    chat.type("\x03")
    chat.wait_for("to leave")
    chat.type("and then\n")
    chat.wait_for(r"to avoid it\.\r\n")
    assert "compiling" not in chat.wait_for(r"reading the prompt \.\.\.\r +\r")
    chat.wait_for(r"\w+ \w+ \w+ ")
    chat.type("\x03")
    kept_now = re.search(r"(\d+) kept", chat.wait_for(r"kept.*stopped\]\r\n"))
    assert kept_now and int(kept_now[1]) > kept
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

    def decode(call: Any, show: Any, stop: Any, on_compile: Any) -> Any:
        decodes.append(call)
        if len(decodes) == 1:
            on_compile()
            os.kill(os.getpid(), signal.SIGINT)
            assert asked_again.wait(60)  # the compiler is still at work when the person types again
            events.append("compiled")
            assert stop()
            show(np.array([5, 6, 7]))
        return chat_command.decode_for_real(call, show, stop, on_compile)

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
    assert "reading the prompt ...\r" in err and "compiling, the first answer takes a while ...\r" in err
    assert "0 kept, 5 written" in err


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

    def decode(call: Any, *_: Any) -> Any:
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
    apart = (["--guidance-scale", "2"], ["--penalty-alpha", "0.6", "--top-k", "4"], ["--no-use-cache"])
    for option in (*apart, ["--cache-implementation", "quantized"]):
        assert main(["chat", "--model", str(chat_folder), *option]) == 1
        assert "a chat continues its cache" in capsys.readouterr().err
    assert main(["chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    template = chat_folder / "chat_template.jinja"
    piped(monkeypatch, [])
    assert main(["chat", "--chat-template", str(template)]) == 0


def test_a_saved_conversation_is_loaded_and_goes_on(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there, saved, again = ["--model", str(chat_folder), "--max-tokens", "5"], tmp_path / "a.json", tmp_path / "b.json"
    piped(monkeypatch, ["hello there", f"/save {saved}"])
    assert main(["chat", *there, "--system", "be kind"]) == 0
    piped(
        monkeypatch, ["/retry", "and then", "/undo", f"/save {again}", f"/load {tmp_path}", "/load", "/clear", "/undo"]
    )
    assert main(["chat", *there, "--load", str(saved), "--system", "be a fox"]) == 0
    out, err = capsys.readouterr()
    assert "3 messages loaded" in err and "(forgotten: and then)" in out and "there is no question yet" in err
    assert f"{tmp_path}: Is a directory" in err and "/load needs the name of a file" in err
    before, after = (json.loads(file.read_text())["messages"] for file in (saved, again))
    assert after[:2] == [{"role": "system", "content": "be a fox"}, before[1]] and len(after) == 3
    saved.write_text(json.dumps([*before, {"role": "user", "content": "who was it"}]))
    piped(monkeypatch, ["hello", f"/load {saved}", "/retry"])
    assert main(["chat", *there]) == 0
    out, err = capsys.readouterr()
    assert "(4 messages loaded; /retry answers the last one)" in out and err.count("5 written") == 2
    saved.write_text("[1]")
    assert main(["chat", *there, "--load", str(saved)]) == 1
    assert "message 1 of" in capsys.readouterr().err


def test_options_are_changed_in_a_chat_and_a_new_temperature_compiles_nothing(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temperatures, counts = [], []

    def decode(call: Any, *rest: Any) -> Any:
        temperatures.append(call.config.merged.temperature)
        answer = chat_command.decode_for_real(call, *rest)
        counts.append(jaxgen.compile_counts())
        return answer

    monkeypatch.setattr(chat_command, "decode_for_real", chat_command.decode, raising=False)
    monkeypatch.setattr(chat_command, "decode", decode)
    changes = [
        "hello there",
        "/set temperature 0.7",
        "hello there",
        "/set temp 1.3",
        "/set seed 5",
        "/set max-tokens 4",
        "hello there",
    ]
    wrong = [
        "/set temperature hot",
        "/set nonsense 3",
        "/set num_beams 2",
        "/set min_p 7",
        "/set top_p",
        "/set do_sample 3",
    ]
    piped(monkeypatch, [*changes, *wrong, "/set", "/set temperature default", "hello there", "/set temp 0"])
    assert main(["chat", "--model", str(chat_folder), "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert temperatures == [1.0, 0.7, 1.3, 1.0] and all(each == counts[0] for each in counts)
    assert "(temp 1.3; answers are sampled (temperature 1.3, top_k 50, top_p 1))" in out and "greedy" in out
    for said in ("invalid float value: 'hot'", "no decoding option 'nonsense'", "shows one answer", "`min_p`"):
        assert said in err
    assert "/set top_p needs a value" in err and "do_sample is true or false" in err
    for said in ("temperature 1.3 (yours)", "max_new_tokens 4 (yours)", "seed 5 (yours)", "top_k 50\n", "not set: "):
        assert said in out
    assert "eos_token_id 2 (the checkpoint's)" in out and "min_p" in out.split("not set: ")[1]


def test_an_assistant_with_another_tokenizer_drafts_the_answers(
    chat_folder: Path, renumbered_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for assistant in ([], ["--assistant", str(renumbered_folder)]):
        piped(monkeypatch, ["hello there", "and then"])
        options = ["--model", str(chat_folder), "--max-tokens", "12", "--temp", "0"]
        assert main(["chat", *options, *assistant]) == 0
        captured = capsys.readouterr()
        answers.append(captured.out)
        assert captured.err.count("drafted tokens were accepted") == (2 if assistant else 0)
    assert answers[0] == answers[1] != ""

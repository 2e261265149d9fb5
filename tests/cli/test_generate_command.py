"""`jaxgen generate`: where its text comes from, and what its options do."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxgen
from jaxgen.cli.main import main

SHORT = ["--max-tokens", "6"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", *arguments, *SHORT]) == 0
    return capsys.readouterr().out


def test_a_text_comes_from_the_command_line_a_file_or_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = output(capsys, "Once upon a time")
    assert told.startswith("Once upon a time") and told.endswith("\n")
    (tmp_path / "text").write_text("Once upon a time")
    assert output(capsys, "--file", str(tmp_path / "text")) == told
    for arguments in ([], ["--file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
        assert output(capsys, *arguments) == told
    assert main(["generate", "x", "--file", "y"]) == 1
    assert "TEXT and --file were both given" in capsys.readouterr().err
    keyboard = io.StringIO()
    keyboard.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", keyboard)
    assert main(["generate"]) == 1
    assert "there is no text to continue" in capsys.readouterr().err


def test_json_holds_the_completions_and_the_times(
    capsys: pytest.CaptureFixture[str], bundled: Any, tokenizer: Any
) -> None:
    beams = ["--num-beams", "3", "--num-return-sequences", "2"]
    told = json.loads(output(capsys, "Once upon a time", "--json", *beams))
    ids = tokenizer("Once upon a time", return_tensors="np")["input_ids"]
    expected = jaxgen.generate(bundled, ids, num_beams=3, num_return_sequences=2, max_new_tokens=6)
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [told["prompt"] + each for each in told["completions"]] == texts
    assert (told["prompt_tokens"], told["new_tokens"]) == (ids.shape[1], expected.shape[1] - ids.shape[1])
    assert 0 < told["first_token_seconds"] <= told["seconds"]
    assert output(capsys, "Once upon a time", *beams) == "\n\n".join(texts) + "\n"


def test_a_seed_or_a_temperature_draws_and_temperature_zero_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = output(capsys, "Once upon a time", "--temp", "1.5", "--seed", "5")
    assert drawn == output(capsys, "Once upon a time", "--temperature", "1.5", "--seed", "5")
    assert drawn != output(capsys, "Once upon a time", "--temp", "1.5", "--seed", "6")
    assert output(capsys, "Once upon a time", "--temp", "0") == output(capsys, "Once upon a time")


def test_a_checkpoints_own_settings_count_as_in_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(jaxgen.BUNDLED_MODEL, tmp_path / "instruct")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5, "eos_token_id": 2}')
    there = ["--model", str(folder)]
    assert output(capsys, "Once upon a time", *there, "--seed", "5") == output(
        capsys, "Once upon a time", "--temp", "1.5", "--seed", "5"
    )
    assert output(capsys, "Once upon a time", *there, "--no-do-sample") == output(capsys, "Once upon a time")


def test_stop_strings_and_negative_prompts_reach_generate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once upon a time", "--stop", "morning", "--stop", "zebra"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("morning")
    plain = output(capsys, "Once upon a time", "--guidance-scale", "3")
    assert plain != output(capsys, "Once upon a time", "--guidance-scale", "3", "--negative-prompt", "a little fox")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-p", "3"], "`min_p`"),
        (["--suppress-tokens", "5"], "`suppress_tokens`"),
        (["--watermarking-config", "5"], "`watermarking_config`"),
        (["--watermarking-config", '{"nope": 1}'], "`watermarking_config`"),
        (["--watermarking-config", '{"greenlist_ratio": "x"}'], "`watermarking_config`"),
        (["--num-beams", "2", "--early-stopping", "[1]"], "early_stopping"),
        (["--temp", "0", "--do-sample"], "Leave out one of them"),
        (["--compile-cache", ""], "empty name"),
        (["--model", ""], "is neither an existing path"),
        (["--file", "/nonexistent"], "TEXT and --file"),
    ],
    ids=str,
)
def test_a_wrong_value_ends_with_one_line_and_no_traceback(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", *options]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_what_is_no_text_is_refused_wherever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert main(["generate", "--file", str(tmp_path / "binary")]) == 1
    assert f"{tmp_path / 'binary'} is not UTF-8 (byte 0xff)" in capsys.readouterr().err
    assert main(["generate", "--file", str(tmp_path)]) == 1
    assert f"{tmp_path}: Is a directory" in capsys.readouterr().err
    for stdin, message in ((io.StringIO("\udc80"), "standard input is not UTF-8"), (None, "there is no text")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate"]) == 1
        assert message in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(jaxgen.BUNDLED_MODEL, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")
    assert main(["generate", "x", "--model", str(folder)]) == 1
    assert f"the tokenizer in {folder} cannot be read" in capsys.readouterr().err
    assert main(["inspect", str(folder)]) == 0
    assert "[2]; the tokenizer" in capsys.readouterr().out


def test_healed_prompts_are_counted_and_cut_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(output(capsys, "Once upon a time ", "--json", "--token-healing"))
    assert told["texts"][0].endswith(told["completions"][0]) and told["new_tokens"] == 6


def test_weights_of_one_byte_tell_the_story_of_a_model_loaded_so(
    capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    small = jaxgen.load(jaxgen.BUNDLED_MODEL, quantize="int8")
    ids = tokenizer("Once upon a time", return_tensors="np")["input_ids"]
    expected = tokenizer.decode(jaxgen.generate(small, ids, max_new_tokens=6)[0], skip_special_tokens=True)
    assert output(capsys, "Once upon a time", "--quantize", "int8") == expected + "\n"


def test_a_question_is_asked_by_the_chat_template_and_its_answer_printed(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer, there = AutoTokenizer.from_pretrained(chat_folder), ["--model", str(chat_folder)]
    messages = [{"role": "user", "content": "hello there"}]
    ids = np.array([tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]])
    tokens = jaxgen.generate(jaxgen.load(chat_folder), ids, max_new_tokens=6)[0, ids.shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    assert output(capsys, "hello there", "--chat", *there) == f"{answer}\n"
    told = json.loads(output(capsys, "hello there", "--chat", "--json", *there))
    assert (told["prompt"], told["completions"], told["prompt_tokens"]) == ("hello there", [answer], ids.shape[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("the story of a fox"))
    told = json.loads(output(capsys, "hello there", "--chat", "--file", "-", "--json", *there))
    assert told["prompt"] == "hello there\n\nthe story of a fox" and told["prompt_tokens"] > ids.shape[1]
    assert main(["generate", "hello there", "--chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_a_bare_text_for_a_model_with_a_chat_template_gets_a_note(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--model", str(chat_folder)]
    by_hand = (chat_folder / "tokenizer_config.json").read_text()
    start = json.loads(by_hand)["bos_token"]
    for text, options, noted in (("hello", there, True), (f"{start}user:hello", there, False), ("hello", [], False)):
        assert main(["generate", text, *SHORT, *options]) == 0
        assert ("has a chat template" in capsys.readouterr().err) == noted


def test_an_assistant_drafts_the_same_text_and_the_last_line_says_how_often_it_was_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["Once upon a time", "--temp", "0.8", "--seed", "3"]
    told = output(capsys, *options)
    for assistant in (
        ["--assistant", "int8"],
        ["--assistant", str(jaxgen.BUNDLED_MODEL), "--num-assistant-tokens", "2"],
    ):
        assert main(["generate", *options, *assistant, *SHORT]) == 0
        captured = capsys.readouterr()
        assert captured.out == told
        assert re.search(
            r"tokens/s; \d+ of \d+ drafted tokens were accepted, in \d forward passes; \d+ programs ready", captured.err
        )


def test_an_assistant_with_another_tokenizer_drafts_too(
    renumbered_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is the model itself with other ids, so every draft is right."""
    told = output(capsys, "Once upon a time")
    options = ["--num-assistant-tokens", "2", "--assistant-confidence-threshold", "0", *SHORT]
    assert main(["generate", "Once upon a time", "--assistant", str(renumbered_folder), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == told
    assert "3 of 3 drafted tokens were accepted, in 3 forward passes" in captured.err
    shutil.copytree(renumbered_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["generate", "Once upon a time", "--assistant", str(tmp_path / "bare"), *options]) == 1
    assert "has neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err


def test_an_assistant_without_a_tokenizer_is_taken_to_have_that_of_the_model(
    bundled: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    jaxgen.save(bundled, tmp_path)
    told = output(capsys, "Once upon a time")
    assert main(["generate", "Once upon a time", "--assistant", str(tmp_path), *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out == told
    assert "taken to have the tokenizer of the model" in captured.err
    assert "drafted tokens were accepted" in captured.err

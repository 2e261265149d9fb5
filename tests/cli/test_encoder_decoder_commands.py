"""The commands with an encoder-decoder model: the text is the encoder's, and what is printed is the decoder's."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from encoder_decoders import VOCAB, encoder_decoder
from word_tokenizer import write_word_tokenizer

import jaxgen
from jaxgen.cli.main import main

TEXT, TOKENS = "w3 w4 w5", 7


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = encoder_decoder(0).write(tmp_path_factory.mktemp("t5") / "model")
    write_word_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = encoder_decoder(1).write(tmp_path_factory.mktemp("bart") / "model")
    write_word_tokenizer(folder, VOCAB)
    return folder


def expected(folder: Path, **arguments: Any) -> tuple[Any, np.ndarray]:
    """The tokenizer, and the tokens that `generate` returns for the text as the tokenizer encodes it."""
    tokenizer = jaxgen.load_tokenizer(folder)
    encoded = tokenizer(TEXT, return_tensors="np")
    return tokenizer, jaxgen.generate(jaxgen.load(folder), **encoded, max_new_tokens=TOKENS, **arguments)


def test_the_text_is_the_encoders_and_the_decoders_text_is_printed_without_its_start(
    t5_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"decoder_start_token_id": 5}  # a word, which would show
    tokenizer, tokens = expected(t5_folder, **start)
    text = tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)
    assert "w" in text
    arguments = ["generate", TEXT, "--model", str(t5_folder), "--max-tokens", str(TOKENS), "--decoder-start-token-id=5"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n", "streamed"
    assert "a prompt of 4 tokens" in captured.err, "with the end of the text, which the tokenizer adds"
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompt"], told["prompt_tokens"], told["new_tokens"]) == (TEXT, 4, TOKENS)
    assert told["texts"] == told["completions"] == [text]


def test_beams_print_the_best_texts(bart_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, tokens = expected(bart_folder, num_beams=3, num_return_sequences=2)
    texts = tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    beams = ["--num-beams", "3", "--num-return-sequences", "2", "--max-tokens", str(TOKENS)]
    assert main(["generate", TEXT, "--model", str(bart_folder), *beams]) == 0
    assert capsys.readouterr().out == "\n\n".join(texts) + "\n"


def test_a_text_is_as_long_as_the_models_settings_say_or_its_positions_reach(
    bart_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", TEXT, "--json", "--eos-token-id", "null", "--model"]
    assert main([*arguments, str(bart_folder)]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 64
    folder = shutil.copytree(bart_folder, tmp_path / "summaries")
    (folder / "generation_config.json").write_text('{"max_length": 9, "decoder_start_token_id": 2}')
    assert main([*arguments, str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 8


def test_what_an_encoder_does_not_go_with_is_refused_in_a_sentence(
    t5_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--model", str(t5_folder)]
    for arguments, message in (
        (["chat", *there], "Use `jaxgen generate --model MODEL TEXT`"),
        (["generate", TEXT, "--chat", *there], "Leave out --chat"),
        (["generate", TEXT, "--guidance-scale", "2", *there], "`guidance_scale`=2.0 does not go with"),
        (["generate", TEXT, "--token-healing", *there], "`token_healing` is about the end of a prompt"),
        (["plan", str(t5_folder), "--assistant", "2-layer"], "has an encoder and 2-layer has none"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_inspect_counts_both_stacks_and_names_the_end(
    t5_folder: Path, bart_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, dict[str, str]] = {}
    for name, folder in (("t5", t5_folder), ("bart", bart_folder)):
        assert main(["inspect", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        found[name] = {line[:12].strip(): line[12:] for line in lines}
    t5, bart = found["t5"], found["bart"]
    assert t5["family"] == "t5, 3 + 2 layers of 32, 2 heads of 8, relu MLP of 24"
    assert t5["context"] == "without a limit"
    assert t5["cache"] == "256 B per token and row; 256 B per token of the source"  # 2 * 2 layers * 16 * 4 bytes
    assert bart["context"] == "64 tokens" and bart["stops at"] == "2 (</s>)"
    assert bart["cache"] == "512 B per token and row; 32.8 kB for a full context; 512 B per token of the source"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(jaxgen.load(t5_folder)))
    assert t5["parameters"] == f"{parameters:,}"


def test_plan_shows_the_memory_of_the_source(t5_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(t5_folder), "--device", "l4", "--prompt-tokens", "100", "--new-tokens", "20"]) == 0
    said = capsys.readouterr().out
    assert "1 x 100 of the source + 20 tokens" in said
    assert "source      32.8 kB\n" in said  # 128 columns of 256 bytes

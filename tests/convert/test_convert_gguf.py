"""A GGUF file becomes a converted folder that loads to the same bits, and a Hugging Face folder from there."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from checkpoints import CONFIG, assert_same_bits, hashes
from gguf_models import byte_level, sentencepiece, write_gguf

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.safetensors_file import StoredTensor

SMALL = CONFIG | {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
KINDS = {"q_proj": "Q4_0", "k_proj": "F16", "v_proj": "BF16", "up_proj": "Q5_1", "embed_tokens": "Q8_0"}


def kind(name: str) -> str:
    return KINDS.get(name.split(".")[-2], "F16")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    metadata = sentencepiece() | {"general.sampling.temp": 0.5}
    return write_gguf(tmp_path / "source" / "model.gguf", SMALL, kind=kind, metadata=metadata)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_loads_to_the_same_bits_there_and_back(architecture: str, tmp_path: Path) -> None:
    config = SMALL | {"model_type": architecture, "tie_word_embeddings": architecture == "qwen2"}
    vocabulary = sentencepiece() if architecture == "llama" else byte_level()
    file = write_gguf(tmp_path / "model.gguf", config, kind=kind, metadata=vocabulary)
    report = convert.convert_checkpoint(file, tmp_path / "native")
    assert not report.warnings
    convert.convert_to_hugging_face(tmp_path / "native", tmp_path / "back")
    model, text = jaxgen.load(file), "hello the <think> é"
    for folder in (tmp_path / "native", tmp_path / "back"):
        assert_same_bits(jaxgen.load(folder), model)
        convert.verify(folder)
        again = jaxgen.load_tokenizer(folder)
        assert again(text)["input_ids"] == jaxgen.load_tokenizer(file)(text)["input_ids"]
        assert again.chat_template == vocabulary["tokenizer.chat_template"]
        assert jaxgen.load(folder).generation_config.eos_token_id == model.generation_config.eos_token_id
    convert.convert_checkpoint(file, tmp_path / "half", dtype="bfloat16")
    assert_same_bits(jaxgen.load(tmp_path / "half"), jaxgen.load(file, jnp.bfloat16))


def test_what_the_file_says_of_sampling_is_in_the_generation_config(file: Path, tmp_path: Path) -> None:
    convert.convert_checkpoint(file, tmp_path / "native")
    written = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert (written["temperature"], written["bos_token_id"], "do_sample" in written) == (0.5, 1, False)


def test_an_interrupted_conversion_continues_to_the_same_bytes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert_checkpoint(file, tmp_path / "whole")
    read, calls = StoredTensor.read, iter(range(100))

    def fails(self: StoredTensor, out: Any, start: int) -> None:
        if next(calls) == 4:
            raise OSError("the disk is gone")
        read(self, out, start)

    monkeypatch.setattr(StoredTensor, "read", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        convert.convert_checkpoint(file, tmp_path / "native", workers=1)
    monkeypatch.undo()
    convert.convert_checkpoint(file, tmp_path / "native", resume=True)
    assert hashes(tmp_path / "native") == hashes(tmp_path / "whole")


def test_the_file_itself_is_verified_and_not_turned_back(file: Path, tmp_path: Path) -> None:
    report = convert.verify(file)
    assert (report.folder, report.tensors) == (file, 12)
    with pytest.raises(CheckpointError, match=r"is a GGUF file. Convert it to a folder first"):
        convert.convert_to_hugging_face(file, tmp_path / "back")
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert.convert_checkpoint(file, file, overwrite=True)


@pytest.mark.parametrize("model", ["rwkv", None])
def test_without_a_tokenizer_that_can_be_read_the_weights_are_converted_with_a_warning(
    model: str | None, file: Path, tmp_path: Path
) -> None:
    vocabulary = sentencepiece() | {"tokenizer.ggml.model": model} if model else {}
    write_gguf(file, SMALL, metadata=vocabulary)
    report = convert.convert_checkpoint(file, tmp_path / "native")
    assert [warning for warning in report.warnings if "tokenizer" in warning] == [*report.warnings]
    assert len(report.warnings) == 1 and not (tmp_path / "native" / "tokenizer.json").exists()
    assert_same_bits(jaxgen.load(tmp_path / "native"), jaxgen.load(file))

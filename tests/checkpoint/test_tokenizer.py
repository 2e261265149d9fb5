"""`load_tokenizer`: what `AutoTokenizer` reads from a folder or, with torch, from a GGUF file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG
from gguf_models import byte_level, sentencepiece, write_gguf

import jaxgen
from jaxgen import CheckpointError, lazy

ROOT = Path(__file__).parents[2]
VOCABULARIES = {"llama": sentencepiece, "qwen2": byte_level, "qwen3": byte_level}
TEXTS = [
    "hello the hello",
    "  hello\n\n\tthe  ",
    "<s>hello</s><think> the<|im_end|>",
    "é 漢字 🙂 ﬁ",
    "1234 it's I'LL x=3.14",
    "",
]


def file(architecture: str, folder: Path, **metadata: Any) -> Path:
    """A model with a vocabulary; two underscores are a dot in the names of more metadata."""
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    config = CONFIG | {"model_type": architecture, "vocab_size": 320}
    return write_gguf(folder / "model.gguf", config, metadata=VOCABULARIES[architecture]() | more)


@pytest.mark.oracle
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_encodes_and_decodes_as_transformers_with_torch(
    architecture: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    named = {} if architecture == "llama" else {"bos_token_id": 256}
    path = file(architecture, tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in (flags | named).items()})
    ours = jaxgen.load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours.save_pretrained(tmp_path / "saved")
    saved = jaxgen.load_tokenizer(tmp_path / "saved")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        for tokenizer in (ours, saved):
            assert tokenizer(text)["input_ids"] == ids, text
            for skip in (False, True):
                assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "hello"}]
    for tokenizer in (ours, saved):
        assert tokenizer.apply_chat_template(messages)["input_ids"] == theirs.apply_chat_template(messages)["input_ids"]
        assert tokenizer.special_tokens_map == theirs.special_tokens_map


def test_bos_comes_first_where_the_file_says_so_or_sentencepiece_does(tmp_path: Path) -> None:
    assert jaxgen.load_tokenizer(file("llama", tmp_path))("hello")["input_ids"][0] == 1
    without = file("llama", tmp_path, tokenizer__ggml__add_bos_token=False)
    assert jaxgen.load_tokenizer(without)("hello")["input_ids"][0] != 1
    tokenizer = jaxgen.load_tokenizer(file("qwen3", tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer(" hello<think>")["input_ids"]) == ["Ġhello", "<think>"]
    assert tokenizer.chat_template and tokenizer.pad_token == "<|endoftext|>"


def test_a_folder_s_own_files_are_read(tokenizer: Any, tmp_path: Path) -> None:
    read = jaxgen.load_tokenizer(str(jaxgen.BUNDLED_MODEL))
    assert read("Once upon a time")["input_ids"] == tokenizer("Once upon a time")["input_ids"]
    with pytest.raises(CheckpointError, match=r"has neither tokenizer.json nor tokenizer.model"):
        jaxgen.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        jaxgen.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer__ggml__tokens": None}, "holds no tokenizer"),
        ({"tokenizer__ggml__model": "rwkv"}, "cannot be read"),
        ({"tokenizer__ggml__bos_token_id": 10**6}, "cannot be read"),
        ({"tokenizer__ggml__merges": None}, "cannot be read"),
        ({"tokenizer__ggml__merges": ["h"]}, "cannot be read"),
        ({"tokenizer__ggml__tokens": 7}, "cannot be read"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        jaxgen.load_tokenizer(file("qwen2", tmp_path, **metadata))


def test_versions_of_transformers_that_split_texts_in_another_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy.transformers(), "__version__", "5.12.0")
    with pytest.raises(
        CheckpointError, match=r"transformers 5\.12\.0 cannot read the tokenizers of GGUF files. Install 5\.18"
    ):
        jaxgen.load_tokenizer(file("llama", tmp_path))


@pytest.mark.usefixtures("processes_with_torch")
def test_no_torch_is_imported(tmp_path: Path) -> None:
    program = (
        f"import sys, jaxgen; jaxgen.load_tokenizer({str(file('llama', tmp_path))!r}); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"

"""Whether a checkpoint is still the same, and what of its folder goes along."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIG, write_checkpoint
from jaxgen.convert import sources
from jaxgen.convert.sources import converted_config, identity, other_files, tokenizer_trouble
from layouts import BF16, F16, F32, mixed

from jaxgen.checkpoint.files import LinkedFolder
from jaxgen.checkpoint.source import open_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


# ---- Whether it is the same ----


def touch(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


def nest(folder: Path) -> Path:
    """Moves one of the files of weights into a folder within."""
    inner = folder / "weights"
    inner.mkdir()
    file = folder / "model-00002-of-00002.safetensors"
    file.rename(inner / file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, f"weights/{file.name}"))
    return inner / file.name


CHANGES: dict[str, Any] = {
    "a file grew": lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG) + "\n"),
    "a file was written anew": lambda folder: touch(folder / "config.json", 2_000_000_001),
    "a file came": lambda folder: (folder / "notes.txt").write_text(""),
    "a file went": lambda folder: (folder / "tokenizer.json").unlink(),
    "a file has another name": lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer_.json"),
    "weights in a folder within were written anew": lambda folder: touch(
        folder / "weights" / "model-00002-of-00002.safetensors", 2_000_000_001
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_is_another_one_once_a_file_of_it_changes(change: str, folder: Path) -> None:
    nest(folder)
    (folder / "tokenizer.json").write_text("{}")
    for path in folder.rglob("*"):
        touch(path, 1_000_000_000)
    before = identity(folder)
    (folder / "config.json").read_bytes()
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("nothing of the model")
    assert identity(folder) == before == json.loads(json.dumps(before))
    CHANGES[change](folder)
    if change == "a file grew":
        touch(folder / "config.json", 1_000_000_000)
    assert identity(folder) != before


def test_the_same_files_elsewhere_are_another_folder(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)
    (tmp_path / "link").symlink_to(folder)
    assert identity(tmp_path / "link") == before
    folder.rename(tmp_path / "moved")
    assert identity(tmp_path / "moved")[1:] == before[1:] and identity(tmp_path / "moved")[0] != before[0]


# ---- Its config ----

WEIGHTS: dict[str, Any] = {"dtype": "float32", "torch_dtype": "float32"}
CONFIGS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "neither key": ({}, F16, {"dtype": "float16"}),
    "the newer key": ({"dtype": "float32"}, BF16, {"dtype": "bfloat16"}),
    "the older key": ({"torch_dtype": "float32"}, F16, {"torch_dtype": "float16"}),
    "both keys": (WEIGHTS, BF16, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    "the dtype they have": ({}, F32, {"dtype": "float32"}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_another_dtype_is_said_under_the_keys_that_there_are(case: str, tmp_path: Path) -> None:
    extra, dtype, expected = CONFIGS[case]
    source = open_checkpoint(write_checkpoint(tmp_path, CONFIG | extra))
    found = json.loads(converted_config(source, np.dtype(dtype)))
    assert found == CONFIG | expected
    assert [*found][: len(CONFIG)] == [*CONFIG]


def test_a_config_of_weights_that_stay_as_they_are_keeps_its_bytes(folder: Path) -> None:
    text = json.dumps(CONFIG, indent=7).encode() + b"\r\n \n"
    (folder / "config.json").write_bytes(text)
    assert converted_config(open_checkpoint(folder), None) == text


def test_a_config_gets_the_rows_that_an_adapter_added_and_says_its_dtype_only_if_asked(folder: Path) -> None:
    source = open_checkpoint(folder)
    (embedding,) = source.pieces["embed_tokens.weight"]
    wider = replace(source, pieces={**source.pieces, "embed_tokens.weight": [replace(embedding, shape=(51, 32))]})  # pyright: ignore
    assert json.loads(converted_config(wider, None)) == CONFIG | {"vocab_size": 51}
    assert json.loads(converted_config(wider, np.dtype(F16))) == CONFIG | {"vocab_size": 51, "dtype": "float16"}


@pytest.mark.parametrize("dtypes", [[BF16], [F32, BF16], [F16]], ids=lambda dtypes: np.dtype(dtypes[0]).name)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_without_its_quantisation_says_the_dtype_of_the_weights(key: str, dtypes: Any, folder: Path) -> None:
    source = open_checkpoint(write_checkpoint(folder.parent / "other", tensors=mixed(dtypes)))
    quantised = replace(source, raw={key: {"quant_method": "fp8"}, **source.raw})
    found = json.loads(converted_config(quantised, None))
    assert found == CONFIG | {"dtype": str(source.own_dtype("layers.0.self_attn.qkv_proj.weight"))}
    assert json.loads(converted_config(quantised, np.dtype(F32))) == CONFIG | {"dtype": "float32"}


# ---- Its other files ----


def test_what_holds_no_weights_goes_along_and_the_rest_is_said(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    kept = ["LICENSE", "README.md", "additional_chat_templates/rag.jinja", "tokenizer.json", "tokenizer.model"]
    left = ["a.bin", "b.gguf", "c.h5", "d.index.json", "e.msgpack", "f.pt", "g.pth", "h.safetensors", "runs"]
    for name in [*kept, *left[:-1], "jaxgen.json"]:
        (folder / name).write_text(name)
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("log")
    found, said = other_files(folder)
    assert found == {name: folder / name for name in kept}
    assert [*found] == sorted(kept)
    assert said == [
        f"{folder}: `a.bin`, `b.gguf`, `c.h5`, `d.index.json`, `e.msgpack` and 4 more are not part of the model and "
        "were skipped."
    ]


def test_of_a_plain_folder_nothing_goes_along_and_nothing_is_said(folder: Path) -> None:
    assert other_files(folder) == ({}, [])
    nest(folder)
    assert other_files(folder) == ({}, [])  # the folder within is of the weights


def test_without_safetensors_the_pickles_are_what_is_left_out(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    found, said = other_files(tmp_path)
    assert [*found] == ["tokenizer.json"]
    assert said == [f"{tmp_path}: `pytorch_model.bin` are not part of the model and were skipped."]


def test_templates_in_a_folder_elsewhere_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rag.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert other_files(folder) == ({}, [])
    linked = LinkedFolder(folder)
    assert [*other_files(linked)[0]] == ["additional_chat_templates/rag.jinja"]


# ---- Its tokenizer ----


@pytest.mark.parametrize(
    ("files", "installed", "odd"),
    [
        (["tokenizer.model"], False, True),
        (["tokenizer.model"], True, False),
        (["tokenizer.model", "tokenizer.json"], False, False),
        (["tokenizer.json"], False, False),
        ([], False, False),
    ],
)
def test_a_tokenizer_that_only_sentencepiece_reads_is_said_where_it_is_missing(
    files: list[str], installed: bool, odd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name == "sentencepiece" and installed) or None)
    said = tokenizer_trouble(tmp_path)
    assert bool(said) == odd
    assert all("tokenizer.model" in each and "pip install sentencepiece" in each for each in said)


def test_the_templates_have_the_folder_that_transformers_gives_them() -> None:
    from transformers.utils import hub

    assert hub.CHAT_TEMPLATE_DIR == sources.TEMPLATES

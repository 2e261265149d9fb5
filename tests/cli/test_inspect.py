"""`jaxgen inspect` describes a checkpoint without loading it."""

from pathlib import Path

import pytest
from architectures import architecture

from jaxgen.checkpoint.load import BUNDLED_MODEL
from jaxgen.cli.main import main


def lines(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, str]:
    assert main(["inspect", str(folder)]) == 0
    return {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}


def test_the_bundled_model_is_described_by_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, BUNDLED_MODEL)
    assert found["parameters"] == "1,115,520" and found["weights"] == "4.5 MB"
    assert found["cache"].startswith("2.6 kB per token and row")  # 2 * 5 layers * 2 heads * 32 * 4 bytes
    assert found["stops at"] == "2 (<|eos|>)" and found["context"] == "512 tokens"
    assert found["chat"] == "has no template"


def test_templates_converted_folders_and_folders_without_a_tokenizer_are_told_apart(
    capsys: pytest.CaptureFixture[str], chat_folder: Path, tmp_path: Path
) -> None:
    assert lines(capsys, chat_folder)["chat"] == "has a template"
    folder = architecture(3).write(tmp_path / "source")
    assert "Hugging Face" in lines(capsys, folder)["folder"]
    assert main(["convert", str(folder), str(tmp_path / "native")]) == 0
    capsys.readouterr()
    assert "converted" in lines(capsys, tmp_path / "native")["folder"]


def test_a_folder_that_is_none_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "is neither an existing path" in capsys.readouterr().err

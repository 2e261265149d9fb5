"""The commands take a GGUF file wherever they take a folder."""

import io
import sys
from pathlib import Path

import pytest
from gguf_models import write_stories

import jaxgen
from jaxgen.cli.main import main


@pytest.fixture(scope="module")
def stories(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_stories(tmp_path_factory.mktemp("stories") / "stories.gguf", one_layer))


def test_generate_tells_the_story_of_the_folder(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for model in (stories, str(jaxgen.BUNDLED_MODEL)):
        assert main(["generate", "Once upon a time", "--model", model, "--max-tokens", "6"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[0].startswith("Once upon a time")


def test_chat_talks_by_the_template_of_the_file(
    stories: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert main(["chat", "--model", stories, "--temp", "0", "--max-tokens", "6"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() and "Traceback" not in said.err


def test_inspect_plan_and_verify_describe_it(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", stories]) == 0
    said = capsys.readouterr().out
    for part in ("stories.gguf (GGUF)", "328,064", "2 (<|eos|>)", "has a template", "stored: float32"):
        assert part in said
    assert main(["plan", stories, "--device", "v5e"]) == 0
    assert "328,064 parameters in float32" in capsys.readouterr().out
    assert main(["verify", stories]) == 0
    assert "verified" in capsys.readouterr().err


def test_the_folder_of_a_file_is_no_model(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(Path(stories).parent)]) == 1
    assert f"Pass the file: {stories}" in capsys.readouterr().err

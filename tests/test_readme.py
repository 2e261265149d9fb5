"""The README is true: its snippet runs, its commands are the ones CI runs, what it links to exists."""

import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import jaxgen
from jaxgen.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run_one_after_the_other_and_print_two_stories(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    first, *others = blocks("python")
    exec(compile(first, "README.md", "exec"), names)
    stories = capsys.readouterr().out.strip().splitlines()
    assert [story.startswith(("Once upon a time", "One day, a small fox")) for story in stories] == [True, True]
    for example in others:
        exec(compile(example, "README.md", "exec"), names)
    sampled, rollouts, beams, streamed, continued, spread = capsys.readouterr().out.splitlines()
    assert sampled.startswith("(8, ") and rollouts.startswith("(3, 2, ") and beams.startswith("(4, ")
    assert len(streamed) > 60 and continued == "2 2"
    assert spread == "True 2"


def test_the_first_screen_has_one_command_to_run_and_one_to_test() -> None:
    run, test = blocks("bash")
    assert run.strip().endswith('jaxgen generate "Once upon a time"')  # tests/cli/test_main.py runs it
    assert "pytest" in test
    assert README.index(test) < README.index("```python")


@pytest.mark.parametrize("line", blocks("sh")[0].splitlines(), ids=lambda line: " ".join(line.split()[:2]))
def test_every_command_of_the_readme_runs(
    line: str, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line.replace("FOLDER", str(chat_folder)), comments=True)
    typed = ""
    if words[0] == "echo":
        typed, words = words[1], words[3:]
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert words[0] == "jaxgen" and main(words[1:]) == 0
    assert capsys.readouterr().out or words[1] == "chat"


def test_the_commands_that_convert_run_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    places = {"SRC": str(folder), "DST": str(tmp_path / "converted"), "BACK": str(tmp_path / "back")}
    for line in blocks("sh")[1].splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "jaxgen" and main([places.get(word, word) for word in words]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    first = next(line for line in README.splitlines() if "pytest" in line)
    assert first == blocks("bash")[1].strip()
    assert "grep -m1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_name_of_the_package_in_the_readme_exists() -> None:
    names = re.findall(r"jaxgen\.(\w+)\(?", README)
    assert "generate" in names
    for name in names:
        assert hasattr(jaxgen, name) or importlib.util.find_spec(f"jaxgen.{name}"), name


@pytest.mark.parametrize(
    "link", re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"python ([\w/]+\.py)", README)
)
def test_every_file_the_readme_names_exists(link: str) -> None:
    assert (ROOT / link).exists()

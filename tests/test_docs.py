"""The pages of docs/ are true: their Python prints what they say, their commands run, what they name exists."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from snippets import blocks, commands, run_command, run_python, without_blocks_not_run

import jaxgen

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
TEXTS = {name: page.read_text() for name, page in PAGES.items()}
# Its stories are those of the trained model.
WITH_THE_WHOLE_MODEL = {"index.md"}


def run_of(names: list[str]) -> list[Any]:
    """These pages as parameters: the quick start runs in the suite, and the others beside it."""
    return [pytest.param(name, marks=[] if name in WITH_THE_WHOLE_MODEL else [pytest.mark.pages]) for name in names]


@pytest.mark.parametrize("name", run_of([name for name in PAGES if any(blocks(TEXTS[name], "python"))]))
def test_the_python_of_a_page_prints_what_the_page_says(
    name: str, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name not in WITH_THE_WHOLE_MODEL:
        monkeypatch.setattr(jaxgen, "BUNDLED_MODEL", chat_folder)
    run_python(PAGES[name], capsys)


@pytest.mark.parametrize("name", run_of([name for name in PAGES if commands(TEXTS[name])]))
def test_the_commands_of_a_page_run_one_after_the_other(
    name: str,
    chat_folder: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jaxgen.cli.terminal.BUNDLED_MODEL", chat_folder)
    places = {"FOLDER": chat_folder, "SRC": folder, "DST": tmp_path / "converted", "BACK": tmp_path / "back"}
    for line in commands(TEXTS[name]):
        run_command(line, places, monkeypatch, capsys)
    if "BACK" in TEXTS[name]:
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_is_not_run_is_python_at_least(name: str) -> None:
    for block in blocks(TEXTS[name], "python"):
        compile(block.code, name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_every_name_of_the_package_on_a_page_exists(name: str) -> None:
    for path in re.findall(r"\bjaxgen\.((?:\w+\.)*\w+)", without_blocks_not_run(TEXTS[name])):
        found = hasattr(jaxgen, path) or path.startswith("generation.outputs.")
        assert found or importlib.util.find_spec(f"jaxgen.{path.rpartition('.')[0] or path}"), path


FILES = {"README.md": ROOT / "README.md", "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md", **PAGES}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_a_page_names_exists(name: str) -> None:
    text, folder = FILES[name].read_text(), FILES[name].parent
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (folder / link).exists(), link
    for path in re.findall(r"\b((?:bench|examples|tests)/[\w/-]+\.\w+)", text):
        assert (ROOT / path).exists(), path


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: jaxgen\.(\w+)$", TEXTS["reference.md"], re.MULTILINE))
    assert shown == {*jaxgen.__all__} - {"__version__"}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install 'jaxgen[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "output_logprobs" in (tmp_path / "site" / "reference" / "index.html").read_text()

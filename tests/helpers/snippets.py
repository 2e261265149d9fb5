"""Pages of Markdown as programs: their Python, its output, and their commands.

    <!-- not run: needs the network -->     a reason, before a block that is not run
    ```python                               blocks of one page share their names
    print("a story", 3)
    ```

    ```text                                 right after it: what it prints, with "..." for anything
    a story ...
    ```

    ```sh                                   commands of jaxgen, which are run too
    jaxgen generate "Once upon a time"
    ```

Blocks of other languages, such as `bash` for installing, are not run.
"""

import doctest
import io
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxgen.cli.main import main

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: the word after the fence.
        code: its lines.
        line: where the code begins in its page, counted from 0.
        output: what it prints; None if the page does not say.
        reason: why it is not run; None if it is.
    """

    language: str
    code: str
    line: int
    output: str | None
    reason: str | None


def blocks(page: str, *languages: str) -> Iterator[Block]:
    """The blocks of a page in these languages, in their order."""
    for match in _BLOCK.finditer(page):
        if match["language"] in languages:
            line = page.count("\n", 0, match.start("code"))
            yield Block(match["language"], match["code"], line, match["output"], match["reason"])


def without_blocks_not_run(page: str) -> str:
    return _BLOCK.sub(lambda match: "" if match["reason"] else match[0], page)


def run_python(page: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs the Python of a page and compares what it prints with the page; the output of each block."""
    names: dict[str, object] = {"__name__": page.stem}
    outputs: list[str] = []
    for block in blocks(page.read_text(), "python"):
        if block.reason is None:
            # Compiled at its place in the page, for tracebacks.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            outputs.append(capsys.readouterr().out)
            if block.output is not None:
                _compare(block.output, outputs[-1], f"{page}:{block.line}")
    return outputs


def _compare(expected: str, printed: str, where: str) -> None:
    alike = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert alike, f"{where} prints\n{printed}and not\n{expected}"


def commands(page: str) -> list[str]:
    """The commands of a page that are run."""
    return [line for block in blocks(page, "sh") if block.reason is None for line in block.code.splitlines()]


def run_command(
    line: str,
    places: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs a line such as `echo "text" | jaxgen generate`, with these paths in the place of such words."""
    words, typed = [str(places.get(word, word)) for word in shlex.split(line, comments=True)], ""
    if words[0] == "echo":
        typed, words = words[1], words[3:]
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert words[0] == "jaxgen" and main(words[1:]) == 0, line
    assert capsys.readouterr().out or words[1] in ("chat", "convert", "verify"), line

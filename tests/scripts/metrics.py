"""Figures of the package's source, to compare two states of it.

    python tests/scripts/metrics.py [FOLDER ...]

prints a column for each checkout, this one by default: how folders are filled, long functions and parameter lists, how
much `Any`, comments per code, and how many places outside of its two rooms know a decoding mode.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODES = {"sampling", "beam_search", "group_beam_search", "contrastive_search"}
OF_MODES = set("num_beams num_beam_groups diversity_penalty length_penalty early_stopping penalty_alpha".split())


def figures(root: Path) -> dict[str, str]:
    """The figures of a checkout by their names, as text."""
    files = sorted([*(root / "jaxgen").rglob("*.py"), *(root / "convert").rglob("*.py")])
    files = [file for file in files if "stories" not in file.parts and not file.parent.is_symlink()]
    texts = {file: file.read_text() for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = sum(text.count("\n") for text in texts.values())
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    folders = {file.parent for file in files}
    entries = {
        folder: len([each for each in folder.iterdir() if each.suffix == ".py" or each in folders])
        for folder in folders
    }
    fullest = max(entries, key=entries.__getitem__)
    comments, code = map(sum, zip(*(_comments(text) for text in texts.values()), strict=True))
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60]
    wide = [node.name for node in functions if len(_parameters(node)) > 7]
    outside = sum(_places(tree) for file, tree in trees.items() if not _is_room(file))
    anys = sum(len(re.findall(r"\bAny\b", text)) for text in texts.values())
    return {
        "files": f"{len(files)}, {lines} lines",
        "folders": f"{len(folders)}, the fullest {fullest.relative_to(root)} of {entries[fullest]}",
        "functions": str(len(functions)),
        "longest": str(max((node.end_lineno or 0) - node.lineno + 1 for node in functions)),
        "over 60 lines": f"{len(long)}: {', '.join(long)}",
        "over 7 parameters": f"{len(wide)}: {', '.join(wide)}",
        "`Any` per 1,000 lines": f"{anys / lines * 1000:.1f}",
        "comments per 100 code lines": f"{comments / code * 100:.1f}",
        "places outside their rooms that know a mode": str(outside),
    }


def _parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def _comments(text: str) -> tuple[int, int]:
    """Lines with a comment, and lines of code: neither blank, nor of a docstring, nor only a comment."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        first = getattr(node, "body", [None])
        first = first[0] if isinstance(first, list) and first else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docstrings |= {*range(first.lineno, (first.end_lineno or 0) + 1)}
    commented = {each.start[0] for each in _tokens(text) if each.type == tokenize.COMMENT}
    lines = enumerate(text.splitlines(), 1)
    code = [
        number
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#") and number not in docstrings
    ]
    return len(commented), len(code)


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _is_room(file: Path) -> bool:
    """Of a mode, or the table of fields, or a caller of `generate`, which names its arguments as users do."""
    callers = {"cli", "commands", "planning"} & {*file.parts} or file.stem in ("chat", "plan", "cli")
    return file.stem in MODES | {"beams", "fields"} or "modes" in file.parts or bool(callers)


def _places(tree: ast.AST) -> int:
    """Names, attributes and strings that tell one mode from another."""
    places = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            places += node.value in OF_MODES | {"parents", "chosen"}
        places += any(getattr(node, name, None) in OF_MODES for name in ("attr", "arg", "id"))
    return places


if __name__ == "__main__":
    columns = [figures(Path(folder).resolve()) for folder in sys.argv[1:] or [ROOT]]
    for name in columns[0]:
        print(f"{name:45}", *(column[name] for column in columns), sep=" | ")

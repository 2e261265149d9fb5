"""docs/arguments.md, from the table of fields and the docstring of `generate`.

`python tests/scripts/arguments.py` writes it again.
"""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import jaxgen
from jaxgen.generation.config.fields import FIELDS, GenerateKeywords, described

FILE = Path(__file__).parents[2] / "docs" / "arguments.md"
_KEYWORDS = described(GenerateKeywords)

_HEAD = """# Every argument of `generate`

Each field of transformers' `GenerationConfig` is a keyword of `jaxgen.generate` and does what it does in transformers
5.24, unless a note says otherwise. The default holds if neither the call nor the checkpoint's `generation_config.json`
sets the field; the keyword `None` switches a field off. On the command line a field is an option of the same name:
`--max-new-tokens` or `--max_new_tokens`; lists and dicts are JSON there. B prompts have P columns.

No argument is ignored without a word: a name that `generate` does not know, a value out of range, and any but the
accepted values of a refused field raise a `ValueError` before anything is compiled.

This page is written by `python tests/scripts/arguments.py`. Change `jaxgen/generation/config/fields.py` or the
docstring of `generate`, not the page.
"""


def page() -> str:
    """The whole file."""
    groups: dict[str, list[str]] = {}
    for name in FIELDS:
        groups.setdefault(FIELDS[name][1].group, []).append(name)
    refused, no_effect = groups.pop("refused"), groups.pop("no effect")
    keywords = [name for name in _KEYWORDS if name not in FIELDS]
    sections = [_HEAD]
    for title, names in groups.items():
        rows = [[f"`{name}`", _type(FIELDS[name][0]), f"`{FIELDS[name][1].default}`", *_words(name)] for name in names]
        sections.append(_section(title, ["field", "type", "default", "what it does", "notes"], rows))
    rows = [[f"`{name}`", _values(FIELDS[name][0]), _sentence(FIELDS[name][1].help)] for name in refused]
    sections.append(_section("refused fields", ["field", "accepted values", "what it does in transformers"], rows))
    rows = [[f"`{name}`", _sentence(FIELDS[name][1].help)] for name in no_effect]
    sections.append(_section("fields without effect", ["field", "why"], rows))
    rows = [[f"`{name}`", _sentence(text)] for name, text in documented().items()]
    sections.append(_section("arguments of generate", ["argument", "what it is"], rows))
    rows = [[f"`{name}`", *_words(name)] for name in keywords]
    sections.append(_section("other keywords of generate", ["keyword", "what it is", "notes"], rows))
    return "\n".join(sections)


def documented() -> dict[str, str]:
    """What the docstring of `generate` says of each of its parameters."""
    lines = inspect.cleandoc(jaxgen.generate.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\nReturns:")[0]
    parts = re.split(r"^    (\w+): ", lines.partition("\n    **")[0], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _section(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return f"## {_capitalised(title)}\n\n{table}\n"


def _words(name: str) -> list[str]:
    """What a keyword does, and the notes on it."""
    field = _KEYWORDS[name][1]
    alias = f"`--{field.alias}` on the command line." if field.alias else ""
    return [_sentence(field.help), " ".join(filter(None, (field.note, alias)))]


def _type(kind: Any) -> str:
    return " or ".join(f"`{_name(each)}`" for each in get_args(kind) if each is not type(None))


def _name(kind: Any) -> str:
    return inspect.formatannotation(kind).replace("collections.abc.", "").replace("typing.", "")


def _values(kind: Any) -> str:
    return ", ".join(f"`{value!r}`" for value in get_args(kind))


def _sentence(text: str) -> str:
    return _capitalised(text).removesuffix(".") + "."


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    FILE.write_text(page())

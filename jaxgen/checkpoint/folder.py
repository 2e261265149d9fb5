"""Reads a Hugging Face folder: its configs, and the files with its weights.

If a folder cannot be loaded, the error says what it holds instead, and what to do.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jaxgen.checkpoint import safetensors_file
from jaxgen.checkpoint.files import CheckpointError, Json, check_name, holds, read_json, read_text
from jaxgen.checkpoint.safetensors_file import Tensor

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MISTRAL_FILE = "consolidated.safetensors"
_MISTRAL = (
    f"in Mistral's own format (params.json, {MISTRAL_FILE}), where tensors have other names and another order. "
    "Download config.json and model*.safetensors, which most repositories of Mistral models also hold."
)


def read_configs(folder: Path) -> tuple[Json, Json | None]:
    """The config.json of a folder and its generation_config.json, if there is one."""
    if not holds(folder, "config.json") and (reason := _why_without_config(folder)):
        raise CheckpointError(f"{folder} {reason}")
    generation = "generation_config.json"
    return read_json(folder, "config.json"), read_json(folder, generation) if holds(folder, generation) else None


def _why_without_config(folder: Path) -> str | None:
    """Why a folder has no config.json, and what to do, as the rest of a sentence about the folder; None if unknown."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".pth") for name in names) and "params.json" in names:
        return "is a checkpoint as Meta distributes it, with pickles. `jaxgen convert --allow-pickle` reads it."
    if MISTRAL_FILE in names:
        return f"is {_MISTRAL}"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"holds {_gguf(folder, ggufs[0])}"
    inner = folder / "snapshots" if "snapshots" in names else folder
    if models := [path for path in sorted(inner.iterdir()) if path.is_dir() and holds(path, "config.json")]:
        if holds(folder, "refs/main"):  # the hub's cache: list the newest snapshot first
            newest = read_text(folder, "refs/main").strip()
            models.sort(key=lambda path: path.name != newest)
        return f"has no config.json, but {listed([str(path) for path in models])} has one. Pass that folder."
    return None


def _gguf(folder: Path, file: str) -> str:
    return f"{file}, which is a complete model. Pass the file: {folder / file}"


def weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """{file: the tensors that the index lists for it}; None in place of the tensors if there is no index.

    With an index, files that it does not name are never read.
    """
    if not holds(folder, INDEX):
        if not holds(folder, SINGLE_FILE):
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE_FILE}{_instead(folder)}")
        return {SINGLE_FILE: None}
    index = read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{folder / INDEX} has no `weight_map` from tensors to files. Download it again.")
    listing: dict[str, set[str]] = {}
    for name, file in index.items():
        listing.setdefault(file, set()).add(name)
    for file in sorted(listing):
        check_name(file, folder / INDEX)
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {file!r}, which is not a safetensors file.")
    return dict(sorted(listing.items()))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    tensors: dict[str, Tensor] = {}
    for file, names in weight_files(folder).items():
        stored = safetensors_file.read_header(folder, file)
        if names is not None and (difference := sorted(names ^ set(stored))):
            raise CheckpointError(f"{INDEX} and {folder / file} disagree about {listed(difference)}.")
        tensors |= stored
    return tensors


def _instead(folder: Path) -> str:
    """What a folder without safetensors holds instead, and what to do, as the rest of a sentence about the folder."""
    names = sorted(path.name for path in folder.iterdir())
    if shards := [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]:
        return f", but {shards[:3]}, which are parts of a model. Download {INDEX} too, which lists their tensors."
    if MISTRAL_FILE in names:
        return f", but {MISTRAL_FILE}, the weights {_MISTRAL}"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f", but {_gguf(folder, ggufs[0])}"
    if pickles := [name for name in names if name.endswith((".bin", ".pth", ".pt"))]:
        return f", but pickles: {pickles}. Pickles can run code, so only `jaxgen convert --allow-pickle` reads them."
    others = [name for name in names if name.endswith((".safetensors", ".msgpack", ".h5"))]
    return f"; jaxgen does not read {others}. Save the model as safetensors." if others else "."


def listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(f"`{name:.200}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

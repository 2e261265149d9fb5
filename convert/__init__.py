"""The weight converter: a Hugging Face folder -> the native folder, which loads without rearranging anything, and back.

The native folder holds the model's own parameters (fused, in the orientation the model multiplies) as safetensors named
by their paths, the source's config and tokenizer files byte for byte, and a manifest that says where everything came
from. It stands beside the package in the source tree and ships inside it as `jaxgen.convert`.

A conversion is a copy: fusing stacks tensors along their first axis, so each keeps its bytes, one behind the other.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen import __version__
from jaxgen.checkpoint import INDEX, MANIFEST, Source, listed, open_folder, weights_dtype
from jaxgen.folder import CheckpointError, file_in, read_json
from jaxgen.quantization import KEYS

from .layout import SHARD_BYTES, File, hugging_face_files, hugging_face_tensors, index, manifest, native_files
from .lora import merged
from .pickles import unpickled
from .sources import local_folder
from .writing import Digest, Partial, digest_of, partial_folder, progress, sha256_of

__all__ = ["Report", "convert_checkpoint", "convert_to_hugging_face", "verify"]

_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".index.json")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        bytes: of the tensors.
        warnings: what is odd about the checkpoint.
    """

    folder: Path
    tensors: int
    bytes: int
    seconds: float
    warnings: tuple[str, ...]


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    shard_size: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
    merge_lora: str | Path | None = None,
) -> Report:
    """Converts a Hugging Face checkpoint. Every parameter keeps its bits and its dtype, unless another is asked for.

    Args:
        src: a folder with config.json and safetensors, only read, or the id of a model on the Hugging Face hub.
        dst: the native folder to make. It appears once it is complete.
        dtype: float32, bfloat16 or float16 for all weights; by default each keeps its own.
        shard_size: how large a file may get, in bytes or as "5GB"; a larger tensor has a file of its own.
        workers: threads that copy.
        overwrite: replace the checkpoint in `dst`, once the new one is complete.
        resume: go on with what an interrupted conversion left.
        allow_pickle: also read `pytorch_model.bin` and Meta's `consolidated.*.pth`, by torch's restricted loader in a
            process of its own.
        merge_lora: a folder with a LoRA adapter to add to the weights.

    Raises:
        CheckpointError: if the source is incomplete or broken (see `jaxgen.load`), or the destination is taken.
        OSError: if the disk is full or does not answer. `resume` goes on from there.
    """
    begun = time.perf_counter()
    threads, shard_bytes = _workers(workers), _bytes(shard_size)
    wanted = None if dtype is None else weights_dtype(dtype)
    folder, target = local_folder(src, allow_pickle), Path(dst)
    _check_places(folder, target)
    plan = [__version__, _identity(folder), str(wanted), shard_bytes, merge_lora and _identity(Path(merge_lora))]
    with contextlib.ExitStack() as stack:
        readable = stack.enter_context(unpickled(folder, target)) if allow_pickle else folder
        source = open_folder(readable)
        if source.native:
            raise CheckpointError(f"{folder} is converted already. Pass the original Hugging Face folder.")
        if merge_lora is not None:
            source = replace(source, pieces=merged(source.pieces, Path(merge_lora)))
        files = native_files(source, wanted, shard_bytes or SHARD_BYTES)
        config = _config(source, wanted)
        partial = stack.enter_context(partial_folder(target, plan, overwrite=overwrite, resume=resume))
        digests = partial.write_tensors(files, threads)
        copied = _copy_others(folder, partial) | {"config.json": hashlib.sha256(config).hexdigest()}
        partial.write(INDEX, index(files).encode())
        hashes = {name: digest.sha256 for name, digest in sorted(digests.items())}
        partial.write(MANIFEST, manifest(source, hashes, copied, exact=wanted is None and readable is folder).encode())
        partial.finish(config)
    return _report(target, files, digests, (*source.warnings, *_tokenizer_oddities(folder)), begun)


def convert_to_hugging_face(
    src: str | Path,
    dst: str | Path,
    *,
    shard_size: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Report:
    """The way back: writes the Hugging Face folder that a converted folder came from, to the byte.

    Of weights that the conversion changed (another dtype, 8-bit floats, an adapter, pickles) it writes what they are
    now, in the usual files.

    Args:
        src: a folder made by `convert_checkpoint`.
        dst, shard_size, workers, overwrite, resume: as there; without `shard_size` the files are those of the source.

    Raises:
        CheckpointError, OSError: as there.
    """
    begun = time.perf_counter()
    threads, shard_bytes = _workers(workers), _bytes(shard_size)
    folder, target = Path(src), Path(dst)
    source = open_folder(folder)
    if not source.native:
        raise CheckpointError(f"{folder} is a Hugging Face folder already.")
    _check_places(folder, target)
    known = read_manifest(folder)
    files, index_text = hugging_face_files(source, known, shard_bytes)
    plan = [__version__, _identity(folder), shard_bytes]
    with partial_folder(target, plan, overwrite=overwrite, resume=resume) as partial:
        digests = partial.write_tensors(files, threads)
        _compare(folder, known, {name: digest.sha256 for name, digest in digests.items()})
        _copy_others(folder, partial)
        if index_text is not None:
            partial.write(INDEX, index_text.encode())
        partial.finish(file_in(folder, "config.json").read_bytes())
    return _report(target, files, digests, source.warnings, begun)


def verify(folder: str | Path) -> Report:
    """Reads a whole checkpoint, of either kind, and compares what a converted one holds with its manifest.

    Raises:
        CheckpointError: naming what is missing, broken, or not what was written.
    """
    begun = time.perf_counter()
    source = open_folder(folder)
    if source.native:
        known = read_manifest(source.folder)
        tensors = hugging_face_tensors(source, known)
    else:
        known = None
        tensors = {tensor.name: tensor for parts in source.pieces.values() for tensor in parts} | dict(source.buffers)
    digests = {}
    with progress("verifying", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for name, tensor in tensors.items():
            digests[name] = digest_of(tensor, lambda data: advance(len(data)))
    if known is not None:
        _compare(source.folder, known, {name: digest.sha256 for name, digest in digests.items()})
        for name, sha256 in known["sha256"]["files"].items():
            if sha256_of(file_in(source.folder, name)) != sha256:
                raise CheckpointError(f"{source.folder / name} is not what was written. Convert the original again.")
    size = sum(tensor.nbytes for tensor in tensors.values())
    odd = (*source.warnings, *_odd_values(source.folder, digests))
    return Report(source.folder, len(tensors), size, time.perf_counter() - begun, odd)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder.

    Raises:
        CheckpointError: if it is not one that `convert_checkpoint` writes.
    """
    content = read_json(folder, MANIFEST)
    try:
        tables = [content["copies"], content["sha256"]["tensors"], content["sha256"]["files"]]
        if origin := content.get("source"):
            tables.append(origin["headers"])
            if not isinstance(origin["index"], str | None):
                raise TypeError(origin["index"])
        if not all(isinstance(text, str) for table in tables for text in [*table.keys(), *table.values()]):
            raise TypeError(tables)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged. Convert the original again.") from error
    return content


def _config(source: Source, dtype: np.dtype | None) -> bytes:
    """config.json as it is, or with what the conversion changed."""
    content = dict(source.raw)
    quantised = [content.pop(key) for key in KEYS if key in content]
    if dtype is None and not any(quantised):
        return file_in(source.folder, "config.json").read_bytes()
    name = str(dtype or source.own_dtype("layers.0.self_attn.qkv_proj.weight"))
    content |= {key: name for key in ("dtype", "torch_dtype") if key in content} or {"dtype": name}
    return json.dumps(content, indent=2).encode() + b"\n"


def _copy_others(folder: Path, partial: Partial) -> dict[str, str]:
    """Copies what is no weight, byte for byte, and returns the SHA-256 of each file."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES)]
    if (folder / _TEMPLATES).is_dir():
        names += [f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).iterdir() if path.is_file()]
    return {
        name: partial.copy(file_in(folder, name), name)
        for name in sorted(names)
        if name not in ("config.json", MANIFEST)
    }


def _compare(folder: Path, known: Mapping[str, Any], found: Mapping[str, str]) -> None:
    copies = known["copies"]
    expected = known["sha256"]["tensors"]
    if wrong := sorted(name for name in found if found[name] != expected.get(copies.get(name, name))):
        raise CheckpointError(f"{folder}: {listed(wrong)} are not what was written. Convert the original again.")


def _tokenizer_oddities(folder: Path) -> list[str]:
    if not (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return []
    if importlib.util.find_spec("sentencepiece"):
        return []
    return [f"{folder} has a tokenizer.model and no tokenizer.json: reading it needs `pip install sentencepiece`."]


def _odd_values(folder: Path, digests: Mapping[str, Digest]) -> list[str]:
    broken = sorted(name for name, digest in digests.items() if not digest.finite)
    zero = sorted(name for name, digest in digests.items() if digest.zero and not name.endswith(".bias"))
    return [
        *([f"{folder}: {listed(broken)} hold NaN or infinity."] if broken else []),
        *([f"{folder}: {listed(zero)} are zero throughout."] if zero else []),
    ]


def _report(
    target: Path, files: Iterable[File], digests: Mapping[str, Digest], odd: Iterable[str], begun: float
) -> Report:
    pieces = [piece for file in files for piece in file.pieces]
    size = sum(piece.nbytes for piece in pieces)
    odd = (*odd, *_odd_values(target, digests))
    return Report(target, len(pieces), size, time.perf_counter() - begun, odd)


def _check_places(folder: Path, target: Path) -> None:
    here, there = folder.resolve(), target.resolve()
    if here == there or here in there.parents:
        raise CheckpointError(f"{target} lies in {folder}, which is only read. Choose another destination.")
    if there in here.parents:
        raise CheckpointError(f"{target} holds the source, {folder}. Choose another destination.")


def _identity(folder: Path) -> list[Any]:
    """What changes if a folder does, as far as can be seen without reading it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise ValueError(f"`workers`={workers} must be at least 1.")
    return workers or min(4, os.cpu_count() or 1)


def _bytes(size: int | str | None) -> int | None:
    """A number of bytes, also written as "5GB" or "500MiB"."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?B)?", str(size).strip().upper())
    if not match or ((unit := match[2] or "").replace("B", "", 1) and unit not in _UNITS) or int(match[1]) < 1:
        raise ValueError(f"`shard_size`={size!r} must be a number of bytes, or one with a unit, such as '5GB'.")
    return int(match[1]) * _UNITS.get(unit, 1)

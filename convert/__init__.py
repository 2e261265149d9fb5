"""The weight converter, between a Hugging Face folder and the native folder, which loads without rearranging anything.

The native folder holds the model's own parameters (fused, in the layout of the model's matmuls) as safetensors named by
their paths, the source's config and tokenizer files byte for byte, and a manifest that says where everything came from.
This package is next to `jaxgen/` in the source tree, and is installed inside it as `jaxgen.convert`.

A conversion is a copy: fusing stacks tensors along their first axis, so each one keeps its bytes, in a row:

    q_proj [64, 32]  k_proj [32, 32]  v_proj [32, 32]    ->    qkv_proj [128, 32]
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from jaxgen import __version__
from jaxgen.checkpoint.files import CheckpointError, Json, checkpoint_folder, file_in, read_json
from jaxgen.checkpoint.folder import INDEX, listed
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.source import MANIFEST, Source, open_checkpoint, weights_dtype

from .layout import SHARD_BYTES, File, hugging_face_files, hugging_face_tensors, index, manifest, native_files
from .lora import merged
from .pickles import unpickled
from .sources import converted_config, identity, other_files, tokenizer_trouble, unpacked
from .writing import Digest, Partial, check_target, digest_of, neighbours, partial_folder, progress, sha256_of

__all__ = ["Report", "convert_checkpoint", "convert_to_hugging_face", "verify"]


@dataclass(frozen=True)
class Report:
    """The result of a conversion or a check.

    Attributes:
        folder: the folder that was written or verified.
        tensors: the number of tensors.
        bytes: the size of the tensors.
        seconds: the time it took.
        warnings: messages for the user.
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
    follow_links: bool = False,
    revision: str | None = None,
) -> Report:
    """Converts a Hugging Face checkpoint. Every parameter keeps its bits and its dtype, unless `dtype` is given.

    Args:
        src: a folder with config.json and safetensors, a GGUF file (its blocks become float32, or `dtype`), or the name
            of a model on the Hugging Face hub. It is only read.
        dst: the native folder to create, which appears once it is complete.
        dtype: float32, bfloat16 or float16 for all weights; by default each keeps its own.
        shard_size: maximum size of a file, in bytes or as "5GB"; a larger tensor gets a file of its own.
        workers: number of threads for copying.
        overwrite, resume: replace the checkpoint in `dst` once the new one is complete; continue an interrupted one.
        allow_pickle: also read pickles, with torch's restricted loader in a separate process; see `pickles`.
        merge_lora: a folder with a LoRA adapter to add to the weights.
        follow_links, revision: see `jaxgen.load`. Links are followed in the adapter's folder too.

    Raises:
        CheckpointError: if the source is broken (see `jaxgen.load`), or the destination is taken.
        OSError: if the disk is full or fails. `resume` continues from there.
    """
    begun = time.perf_counter()
    threads, shard_bytes, target = _workers(workers), _bytes(shard_size), _target(dst, overwrite)
    wanted = None if dtype is None else weights_dtype(dtype)
    folder = checkpoint_folder(local_path(src, revision, pickles=allow_pickle), follow_links)
    adapter = None if merge_lora is None else checkpoint_folder(merge_lora, follow_links)
    _check_places(target, folder, *([] if adapter is None else [adapter]))
    before = identity(folder)
    with contextlib.ExitStack() as stack:
        readable = stack.enter_context(unpickled(folder, target)) if allow_pickle else folder
        source = stack.enter_context(unpacked(_original(folder, readable, follow_links)))
        plan = [__version__, before, str(wanted), shard_bytes, *([] if adapter is None else [identity(adapter)])]
        if adapter is not None:
            source = replace(source, pieces=merged(source.pieces, adapter))
        files, is_file = native_files(source, wanted, shard_bytes or SHARD_BYTES), folder.is_file()  # a GGUF file
        config, others, left_out = converted_config(source, wanted), *other_files(source.folder if is_file else folder)
        needed = sum(file.nbytes for file in files)
        partial = stack.enter_context(partial_folder(target, plan, needed, overwrite=overwrite, resume=resume))
        digests, copied = partial.write_tensors(files, threads), _copied(partial, others, config)
        partial.write(INDEX, index(files).encode())
        hashes = {name: digest.sha256 for name, digest in sorted(digests.items())}
        exact = wanted is None and readable is folder and adapter is None and not is_file
        partial.write(MANIFEST, manifest(source, hashes, copied, exact=exact).encode())
        if identity(folder) != before:  # or the new folder could hold parts of two versions
            raise CheckpointError(f"{folder} changed while it was converted. Begin again.")
        partial.write("config.json", config)  # last: without it the folder does not load
    # Pickles that were read are among what is left out.
    messages = [*source.warnings, *(left_out if readable is folder else []), *tokenizer_trouble(folder)]
    return _report(target, files, [*messages, *_suspicious_values(folder, digests, wanted)], begun)


def _original(folder: Path, readable: Path, follow_links: bool) -> Source:
    """The source of a conversion, from the folder that holds it as safetensors."""
    source = open_checkpoint(readable, follow_links=follow_links)
    if source.native:
        raise CheckpointError(f"{folder} is already converted. Pass the original Hugging Face folder.")
    return source


def convert_to_hugging_face(
    src: str | Path,
    dst: str | Path,
    *,
    shard_size: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    follow_links: bool = False,
    revision: str | None = None,
) -> Report:
    """Converts back: writes the Hugging Face folder that a converted folder came from, byte for byte.

    If the conversion changed the weights (another dtype, 8-bit floats, an adapter, pickles, GGUF), it writes the
    changed weights, in files as transformers names them.

    Args:
        src: a folder made by `convert_checkpoint`, or its name on the Hugging Face hub.
        dst, shard_size, workers, overwrite, resume, follow_links, revision: see `convert_checkpoint`; without
            `shard_size` the files are those of the source.

    Raises:
        CheckpointError, OSError: see `convert_checkpoint`.
    """
    begun = time.perf_counter()
    threads, shard_bytes, target = _workers(workers), _bytes(shard_size), _target(dst, overwrite)
    folder = checkpoint_folder(local_path(src, revision), follow_links)
    source = open_checkpoint(folder, follow_links=follow_links)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a GGUF file. Convert it to a folder first, and then convert that folder with --to-hf."
        )
    if not source.native:
        raise CheckpointError(f"{folder} is already a Hugging Face folder.")
    _check_places(target, folder)
    known = read_manifest(folder)
    files, index_text = hugging_face_files(source, known, shard_bytes)
    config, (others, left_out) = file_in(folder, "config.json").read_bytes(), other_files(folder)
    plan, needed = [__version__, identity(folder), shard_bytes], sum(file.nbytes for file in files)
    with partial_folder(target, plan, needed, overwrite=overwrite, resume=resume) as partial:
        digests = partial.write_tensors(files, threads)
        copied = _copied(partial, others, config)
        _compare(folder, known, digests, copied)
        if index_text is not None:
            partial.write(INDEX, index_text.encode())
        partial.write("config.json", config)
    return _report(target, files, [*source.warnings, *left_out, *_suspicious_values(folder, digests)], begun)


def verify(folder: str | Path, *, follow_links: bool = False, revision: str | None = None) -> Report:
    """Reads a whole checkpoint of either kind, and compares a converted one with the hashes in its manifest.

    Args:
        folder: a Hugging Face or converted folder, a GGUF file, or the name of a model on the Hugging Face hub.
        follow_links, revision: see `jaxgen.load`.

    Raises:
        CheckpointError: if a file or tensor is missing, broken, or different from what was written; the message names
            it.
    """
    begun = time.perf_counter()
    source = open_checkpoint(local_path(folder, revision), follow_links=follow_links)
    known = read_manifest(source.folder) if source.native else None
    if known is None:
        tensors = {tensor.name: tensor for parts in source.pieces.values() for tensor in parts} | dict(source.buffers)
    else:
        hugging_face_files(source, known, None)  # raises if it could not be converted back
        tensors = hugging_face_tensors(source, known)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with progress("verifying", size) as advance:
        digests = {name: digest_of(tensor, lambda data: advance(len(data))) for name, tensor in tensors.items()}
    if known is not None:
        others, _ = other_files(source.folder)
        others["config.json"] = file_in(source.folder, "config.json")
        _compare(source.folder, known, digests, {name: sha256_of(path) for name, path in others.items()})
    messages = (*source.warnings, *_suspicious_values(source.folder, digests))
    return Report(source.folder, len(tensors), size, time.perf_counter() - begun, messages)


def read_manifest(folder: Path) -> Json:
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


def _copied(partial: Partial, others: Mapping[str, Path], config: bytes) -> dict[str, str]:
    """Copies the files without tensors. Returns the SHA-256 of each, and of the config, which is written last."""
    hashes = {name: partial.copy(path, name) for name, path in others.items()}
    return hashes | {"config.json": hashlib.sha256(config).hexdigest()}


def _compare(folder: Path, known: Json, digests: Mapping[str, Digest], files: Mapping[str, str]) -> None:
    """Raises CheckpointError if the hashes differ from those in the manifest."""
    copies, expected = known["copies"], known["sha256"]
    wrong = [name for name in digests if digests[name].sha256 != expected["tensors"].get(copies.get(name, name))]
    wrong += [name for name in expected["files"] if expected["files"][name] != files.get(name)]
    if wrong:
        raise CheckpointError(
            f"{folder} has changed since it was written: {listed(sorted(wrong))}. Convert the original again."
        )


def _suspicious_values(folder: Path, digests: Mapping[str, Digest], dtype: np.dtype | None = None) -> list[str]:
    """Warnings about tensors with NaN or infinity, and about weights of zeros."""
    broken = sorted(name for name, digest in digests.items() if not digest.finite)
    zero = sorted(name for name, digest in digests.items() if digest.zero and not name.endswith(".bias"))
    cast = " The largest float16 is 65504; try bfloat16." if dtype == np.float16 else ""
    return [
        *([f"{folder}: NaN or infinity in {listed(broken)}.{cast}"] if broken else []),
        *([f"{folder}: nothing but zeros in {listed(zero)}."] if zero else []),
    ]


def _report(target: Path, files: Iterable[File], messages: Iterable[str], begun: float) -> Report:
    pieces = [piece for file in files for piece in file.pieces]
    size = sum(piece.nbytes for piece in pieces)
    return Report(target, len(pieces), size, time.perf_counter() - begun, tuple(messages))


def _target(dst: str | Path, overwrite: bool) -> Path:
    if not str(dst):
        raise ValueError("`dst` is empty. Pass the folder to create.")
    target = Path(os.path.abspath(dst))  # unlike `resolve`, it does not follow links
    check_target(target, overwrite)
    return target


def _check_places(target: Path, *sources: Path) -> None:
    """Raises CheckpointError if the target lies in a source or contains one."""
    ours = [path.resolve() for path in (target, *neighbours(target))]
    for folder in sources:
        here = folder.resolve()
        for place in ours:
            if here == place or here in place.parents:
                raise CheckpointError(
                    f"{target} is the source {folder} or lies in it, but the source is only read. Choose another "
                    "destination."
                )
            if place in here.parents:
                raise CheckpointError(f"{target} contains the source, {folder}. Choose another destination.")


def _workers(workers: int | None) -> int:
    if workers is None:
        return 4  # even on two cores, since threads mostly wait for the disk
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers`={workers!r} must be an integer, at least 1.")
    return workers


def _bytes(size: int | str | None) -> int | None:
    """The number of bytes in a size such as 5000, "5GB" or "500MiB"."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)\s*(?:([KMGT])(I?))?B?", str(size).strip().upper())
    if not match or int(match[1]) < 1:
        raise ValueError(f"`shard_size`={size!r} must be a number of bytes, or a number with a unit, such as '5GB'.")
    number, unit, binary = match.groups()
    return int(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " ")

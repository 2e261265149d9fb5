"""Writes a folder that appears complete or not at all. An interrupted run can be resumed.

Everything is written to a new folder next to the destination, which is renamed when it is complete. Until then no part
of it can be mistaken for a checkpoint: a file gets its header when it holds all of its tensors, and config.json comes
last. A journal next to it lists each finished tensor with its SHA-256. Resuming re-hashes the tensors it lists and
trusts nothing else. Only while the journal exists may these folders be changed or removed:

    DST               the destination
    DST.partial       the new folder; becomes DST at the end
    .DST.replaced     the old DST with `overwrite`, for the moment between two renames
    .DST.journal      the journal, locked while a process writes it
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from filelock import lock_descriptor
from tqdm import tqdm

from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.safetensors_file import BLOCK, Tensor

from .layout import File, Piece
from .sources import TEMPLATES


@dataclass(frozen=True)
class Digest:
    """The hash of a tensor's values, and whether they are all finite and whether they are all zero."""

    sha256: str
    finite: bool
    zero: bool


class Partial:
    """A folder that is being written.

    Attributes:
        folder: its path until it is complete.
        finished: digests of the tensors that an earlier run wrote, by file and offset.
    """

    def __init__(self, folder: Path, journal: TextIO, finished: Mapping[tuple[str, int], Digest]):
        self.folder = folder
        self.finished = finished
        self._journal = journal
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def write_tensors(self, files: list[File], workers: int) -> dict[str, Digest]:
        """Writes the tensors, and then the headers.

        Returns:
            The digest of each tensor, by its name in the source.
        """
        for file in files:
            path = self.folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as opened:  # full size at once, with zeros where the header belongs
                opened.truncate(file.nbytes)
        pieces = [(file, piece) for file in files for piece in file.pieces]
        total = sum(piece.nbytes for _, piece in pieces)
        digests: dict[str, Digest] = {}
        with progress("converting", total) as advance, ThreadPoolExecutor(workers) as pool:
            tasks = {pool.submit(self._piece, file.name, piece, advance): piece for file, piece in pieces}
            try:
                for task in as_completed(tasks):
                    digests[tasks[task].tensor.name] = task.result()
            finally:  # running threads end at their next block
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
        # Headers last: until then the files begin with zeros, which no reader takes for safetensors.
        for file in files:
            with (self.folder / file.name).open("rb+") as opened:
                opened.write(file.header)
                opened.flush()
                os.fsync(opened.fileno())
        return digests

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, which appears complete or not at all."""
        # Flushed to the disk before the rename, or a crash could leave an empty file of this name.
        unfinished = self.folder / f"{name}.unfinished"
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.folder / name)

    def copy(self, path: Path, name: str) -> str:
        """Copies a file, and returns its SHA-256."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        with (self.folder / name).open("wb") as file:
            sha256 = sha256_of(path, file.write)
            file.flush()
            os.fsync(file.fileno())
        return sha256

    def _piece(self, file: str, piece: Piece, advance: Callable[[int], None]) -> Digest:
        with (self.folder / file).open("rb+", buffering=0) as opened:
            # The journal says that this piece was written, but not that it reached the disk.
            known = self.finished.get((file, piece.offset))
            if known and known.sha256 == self._hash(opened.fileno(), piece, advance):
                return known
            offset = piece.offset

            def write(data: memoryview) -> None:
                nonlocal offset
                self._go_on()
                _write_at(opened.fileno(), data, offset)
                offset += len(data)
                advance(len(data))

            digest = digest_of(piece.tensor, write, piece.dtype)
            if sys.platform == "linux":
                # Starts writing the range to the disk while the next tensors are read: 0.60 -> 0.80 of the speed of
                # copying.
                os.posix_fadvise(opened.fileno(), piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)
        line = json.dumps([file, piece.offset, digest.sha256, digest.finite, digest.zero])
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()
        return digest

    def _hash(self, descriptor: int, piece: Piece, advance: Callable[[int], None]) -> str:
        """The SHA-256 of the bytes that the file holds in the place of the piece."""
        sha256 = hashlib.sha256()
        end = piece.offset + piece.nbytes
        for offset in range(piece.offset, end, BLOCK):
            self._go_on()
            block = os.pread(descriptor, min(BLOCK, end - offset), offset)
            sha256.update(block)
            advance(len(block))
        return sha256.hexdigest()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("another tensor could not be written")


def digest_of(tensor: Tensor, take: Callable[[memoryview], None], dtype: np.dtype | None = None) -> Digest:
    """Reads a whole tensor.

    Args:
        tensor: to read.
        take: called with its bytes in order, block by block.
        dtype: the dtype that the values are first cast to; the tensor's own by default.
    """
    sha256, zero, finite = hashlib.sha256(), True, True
    for values in tensor.blocks(dtype=dtype):
        largest, infinity = _largest_magnitude(values)
        zero, finite = zero and not largest, finite and largest < infinity
        data = values.reshape(-1).view(np.uint8).data
        sha256.update(data)
        take(data)
    return Digest(sha256.hexdigest(), finite, zero and tensor.nbytes > 0)


def sha256_of(path: Path, take: Callable[[bytes], object] = len) -> str:
    """The hash of a file; `take` gets its content, block by block."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            take(block)
    return sha256.hexdigest()


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes, shown after two seconds; any thread may call the function it yields."""
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, delay=2) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


def check_target(target: Path, overwrite: bool) -> None:
    """Checks that a destination may be written.

    Raises:
        CheckpointError: if it exists, unless it is an empty folder or, with `overwrite`, a checkpoint.
    """
    if target.is_symlink():
        raise CheckpointError(f"{target} is a link. Pass the path that it leads to.")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists already and is not a folder. Choose another destination.")
    if target.is_mount():
        raise CheckpointError(f"{target} is a mount point, which cannot be replaced. Choose a folder in it.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists already and is not empty. Choose another destination, or replace it with --overwrite "
            "(`overwrite=True`)."
        )
    weights = any(path.name.endswith((".safetensors", ".bin", ".pth")) for path in target.iterdir())
    others = [path.name for path in target.iterdir() if path.is_dir() and path.name != TEMPLATES]
    if others or not weights or not (target / "config.json").exists():
        raise CheckpointError(
            f"{target} is not just a checkpoint folder, so it is not overwritten. Choose another destination, or "
            "remove it yourself."
        )


def neighbours(target: Path) -> tuple[Path, Path, Path]:
    """The paths of the new folder, the old one and the journal, next to the destination."""
    return (
        target.with_name(f"{target.name}.partial"),
        target.with_name(f".{target.name}.replaced"),
        target.with_name(f".{target.name}.journal"),
    )


@contextmanager
def partial_folder(target: Path, plan: object, needed: int, *, overwrite: bool, resume: bool) -> Iterator[Partial]:
    """The folder that becomes `target` when the block is left without an error.

    Args:
        target: the destination.
        plan: JSON that identifies the source and the options; only a run with the same plan is resumed.
        needed: bytes that will be written.
        overwrite: whether `target` may hold a checkpoint, which is removed once the new one is complete.
        resume: whether to continue an interrupted run.
    """
    folder, replaced, journal = neighbours(target)
    begun = journal.exists()
    if not begun and (taken := [path for path in (folder, replaced) if path.is_symlink() or path.exists()]):
        raise CheckpointError(
            f"{taken[0]} is in the way, and it is not from a conversion. Move it, or choose another name."
        )
    if not begun:
        _check_space(target, needed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a+", errors="replace") as opened:
        # The journal itself is locked. The system releases the lock when the process ends, even if it is killed.
        if not lock_descriptor(opened.fileno(), blocking=False):
            raise CheckpointError(f"another process is converting to {target} now.")
        if replaced.exists():  # interrupted between the two renames below, or after them
            _remove(replaced) if target.exists() else replaced.rename(target)
        check_target(target, overwrite)
        if folder.exists() and not resume:
            raise CheckpointError(
                f"{folder} was left by an interrupted conversion to {target}. Continue it with --resume "
                "(`resume=True`), or remove it."
            )
        finished = _finished(opened, folder, hashlib.sha256(json.dumps(plan).encode()).hexdigest())
        if begun:
            _check_space(target, needed - sum(path.stat().st_blocks * 512 for path in folder.rglob("*")))
        folder.mkdir(exist_ok=True)
        # Written last in every run: without it the folder is not a checkpoint.
        (folder / "config.json").unlink(missing_ok=True)
        try:
            yield Partial(folder, opened, finished)
        except CheckpointError:  # an error in the source, so there is nothing to resume
            _remove(folder)
            journal.unlink()
            raise
        # All entries are flushed to the disk before the rename, or a crash could leave the final name with missing
        # files.
        _sync(folder)
        check_target(target, overwrite)  # again: it may have appeared meanwhile
        if overwrite and target.exists():
            target.rename(replaced)
        folder.rename(target)
        _sync(target.parent)
        if replaced.exists():
            _remove(replaced)
        journal.unlink()


def _check_space(target: Path, needed: int) -> None:
    parent = next(parent for parent in target.parents if parent.exists())
    if needed > (free := shutil.disk_usage(parent).free):
        raise CheckpointError(
            f"{parent} has {free:,} bytes left, and {needed:,} are needed. Make room there, or choose another disk."
        )


def _finished(journal: TextIO, folder: Path, fingerprint: str) -> dict[tuple[str, int], Digest]:
    """The digests in the journal of an interrupted run, by file and offset; starts the journal of a new run."""
    journal.seek(0)
    first, *lines = journal.read().split("\n")
    if not lines or not folder.exists():  # nothing to resume
        journal.truncate(0)
        journal.write(fingerprint + "\n")
        journal.flush()
        return {}
    if first != fingerprint:
        raise CheckpointError(
            f"{folder} was begun from another source, with other options or by another version of jaxgen. Remove it, "
            "or repeat the same conversion."
        )
    finished = {}
    for line in lines:
        try:
            file, offset, *digest = json.loads(line)
        except ValueError:  # the process ended while it wrote this line
            continue
        finished[file, offset] = Digest(*digest)
    if lines[-1]:  # end the line that was cut, so that the next entry does not continue it
        journal.write("\n")
    return finished


def _largest_magnitude(values: np.ndarray) -> tuple[int, int]:
    """The largest magnitude of the values as an integer, and that of infinity.

    Without its sign bit a float is ordered like the integer of the same bits, with NaN above infinity:

        sign | exponent | mantissa        infinity: 0 | 1...1 | 0...0
    """
    bits = 8 * values.dtype.itemsize
    exponent = {"bfloat16": 8, "float16": 5, "float32": 8, "float64": 11}.get(str(values.dtype))
    if exponent is None or not values.size:  # a buffer of another dtype
        return int(bool(np.any(values))), 2
    integers = values.reshape(-1).view(f"u{bits // 8}")
    scratch = np.empty(min(len(integers), 1 << 16), integers.dtype)  # small, so that it stays in the nearest cache
    largest = 0
    for start in range(0, len(integers), len(scratch)):
        part = integers[start : start + len(scratch)]
        magnitudes = np.bitwise_and(part, (1 << (bits - 1)) - 1, out=scratch[: len(part)])
        largest = max(largest, int(magnitudes.max()))
    return largest, ((1 << exponent) - 1) << (bits - 1 - exponent)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _remove(folder: Path) -> None:
    """Removes a folder, config.json first, so that the rest is not a checkpoint."""
    (folder / "config.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Waits until the entries of the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

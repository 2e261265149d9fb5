"""Writing a folder that appears whole or not at all, and that an interrupted run can go on with.

Everything is written to a folder beside the destination, which is renamed when it is complete. Until then no part of it
can be mistaken for a checkpoint: a file gets its header when it holds all of its tensors, and config.json comes last.
A journal beside it names each finished tensor and its SHA-256; who resumes reads those again and trusts nothing else.
While the journal is there, and only then, the folders of these names are ours to change and to remove.
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
from typing import Any, TextIO

import numpy as np
from filelock import lock_descriptor
from tqdm import tqdm

from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.safetensors_file import BLOCK, Tensor

from .layout import File, Piece
from .sources import TEMPLATES


@dataclass(frozen=True)
class Digest:
    """What is known of a tensor's values once they were read."""

    sha256: str
    finite: bool
    zero: bool


class Partial:
    """A folder on its way.

    Attributes:
        folder: where it is until it is complete.
        finished: the tensors of an earlier run, by file and offset.
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
            What is known of each tensor, by its name in the source.
        """
        for file in files:
            path = self.folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as opened:
                opened.truncate(file.nbytes)
        pieces = [(file, piece) for file in files for piece in file.pieces]
        total = sum(piece.nbytes for _, piece in pieces)
        digests: dict[str, Digest] = {}
        with progress("converting", total) as advance, ThreadPoolExecutor(workers) as pool:
            tasks = {pool.submit(self._piece, file.name, piece, advance): piece for file, piece in pieces}
            try:
                for task in as_completed(tasks):
                    digests[tasks[task].tensor.name] = task.result()
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
        for file in files:
            with (self.folder / file.name).open("rb+") as opened:
                opened.write(file.header)
                opened.flush()
                os.fsync(opened.fileno())
        return digests

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, which appears whole."""
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
                # It begins to write the range to the disk, which goes on while the next tensors are read: 0.60 -> 0.80
                # of the speed of copying.
                os.posix_fadvise(opened.fileno(), piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)
        line = json.dumps([file, piece.offset, digest.sha256, digest.finite, digest.zero])
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()
        return digest

    def _hash(self, descriptor: int, piece: Piece, advance: Callable[[int], None]) -> str:
        """Of what a file holds in a piece's place."""
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
    """Reads a tensor to its end.

    Args:
        take: gets its bytes, in their order.
        dtype: what the values are cast to before; their own by default.
    """
    sha256, zero, finite = hashlib.sha256(), True, True
    for values in tensor.blocks(dtype=dtype):
        largest, infinity = _largest_magnitude(values)
        zero, finite = zero and not largest, finite and largest < infinity
        data = values.reshape(-1).view(np.uint8).data
        sha256.update(data)
        take(data)
    return Digest(sha256.hexdigest(), finite, zero and tensor.nbytes > 0)


def sha256_of(path: Path, take: Callable[[bytes], Any] = len) -> str:
    """The hash of a file, whose content `take` gets on the way."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            take(block)
    return sha256.hexdigest()


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, with an estimate, for what takes longer than a moment; any thread may move it on."""
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, delay=2) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a destination that is taken.

    Raises:
        CheckpointError: if it is anything but an empty folder, or with `overwrite` a checkpoint.
    """
    if target.is_symlink():
        raise CheckpointError(f"{target} is a link. Pass the place that it leads to.")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists already and is no folder. Choose another destination.")
    if target.is_mount():
        raise CheckpointError(f"{target} is a mount point, which cannot be replaced. Choose a folder in it.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists already and is not empty. Choose another destination, or replace it by --overwrite "
            "(`overwrite=True`)."
        )
    weights = any(path.name.endswith((".safetensors", ".bin", ".pth")) for path in target.iterdir())
    others = [path.name for path in target.iterdir() if path.is_dir() and path.name != TEMPLATES]
    if others or not weights or not (target / "config.json").exists():
        raise CheckpointError(
            f"{target} holds more or less than a checkpoint, so it is not overwritten. Choose another destination, or "
            "remove it yourself."
        )


def neighbours(target: Path) -> tuple[Path, Path, Path]:
    """What may be beside a destination while it is made: the new folder, the old one, the journal."""
    return (
        target.with_name(f"{target.name}.partial"),
        target.with_name(f".{target.name}.replaced"),
        target.with_name(f".{target.name}.journal"),
    )


@contextmanager
def partial_folder(target: Path, plan: Any, needed: int, *, overwrite: bool, resume: bool) -> Iterator[Partial]:
    """The folder that becomes `target` when the block is left without an error.

    Args:
        plan: what is to be written, as JSON; a run that was interrupted is only gone on with if it had the same.
        needed: bytes that it will take.
        overwrite: whether a checkpoint may be in the target's place; it goes when the new one is complete.
        resume: whether to go on with what an interrupted run left.
    """
    folder, replaced, journal = neighbours(target)
    begun = journal.exists()
    if not begun and (taken := [path for path in (folder, replaced) if path.is_symlink() or path.exists()]):
        raise CheckpointError(f"{taken[0]} is in the way, and no conversion made it. Move it, or choose another name.")
    if not begun:
        _check_space(target, needed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a+", errors="replace") as opened:
        # Of the journal itself, and no file beside it; the system lets go of it when the process ends, however it does.
        if not lock_descriptor(opened.fileno(), blocking=False):
            raise CheckpointError(f"another process is converting to {target} now.")
        if replaced.exists():  # interrupted between the renamings below, or after them
            _remove(replaced) if target.exists() else replaced.rename(target)
        check_target(target, overwrite)
        if folder.exists() and not resume:
            raise CheckpointError(
                f"{folder} is what an interrupted conversion to {target} left. Go on with it by --resume "
                "(`resume=True`), or remove it."
            )
        finished = _finished(opened, folder, hashlib.sha256(json.dumps(plan).encode()).hexdigest())
        if begun:
            _check_space(target, needed - sum(path.stat().st_blocks * 512 for path in folder.rglob("*")))
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        try:
            yield Partial(folder, opened, finished)
        except CheckpointError:  # the source is at fault: nothing to go on with
            _remove(folder)
            journal.unlink()
            raise
        _sync(folder)
        check_target(target, overwrite)  # which may have appeared in the meantime
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
    """What the journal of an interrupted run says, or the beginning of a new one."""
    journal.seek(0)
    first, *lines = journal.read().split("\n")
    if not lines or not folder.exists():  # nothing to go on with
        journal.truncate(0)
        journal.write(fingerprint + "\n")
        journal.flush()
        return {}
    if first != fingerprint:
        raise CheckpointError(
            f"{folder} was begun from another source, with other options or by another version of jaxgen. Remove it, "
            "or repeat the conversion as it was."
        )
    finished = {}
    for line in lines:
        try:
            file, offset, *digest = json.loads(line)
        except ValueError:  # cut in the middle
            continue
        finished[file, offset] = Digest(*digest)
    if lines[-1]:
        journal.write("\n")
    return finished


def _largest_magnitude(values: np.ndarray) -> tuple[int, int]:
    """The largest of the values' magnitudes as an integer, and the one that infinity has."""
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
    """Beginning with what makes a checkpoint of it."""
    (folder / "config.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """What the folder lists is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

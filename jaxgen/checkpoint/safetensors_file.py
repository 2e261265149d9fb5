"""Reading and writing safetensors a few rows at a time.

The `safetensors` package only validates a file here. Its readers map the whole file into memory, which counts as a
second copy of the model; so the bytes are read with plain `preadv`, straight into the array that keeps them.

    8 bytes          length bytes                              the rest
    length (uint64)  {"NAME": {"dtype", "shape", "data_offsets": [start, stop]}, ...}   data
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgen.checkpoint.files import LARGEST_JSON, CheckpointError, file_in, parse_json, refuse_placeholder

# The dtypes that weights may have in memory, and those they may have in a file.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
STORED = DTYPES | {"F64": np.dtype(np.float64)}
FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
# All dtypes that a file may hold, including those of buffers and of parts of quantised weights.
_ALL = (
    STORED
    | FLOAT8
    | {"F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}
    | {"BOOL": np.dtype(np.bool), "C64": np.dtype(np.complex64)}
    | {f"{kind.upper()}{bits}": np.dtype(f"{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32, 64)}
)
NAMES = {dtype: name for name, dtype in _ALL.items()}

BLOCK = 1 << 20  # bytes read at a time: large enough for a disk, small enough for the CPU's caches


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, whose rows (its first axis) are read or computed on demand.

    Attributes:
        name: as in its file.
        dtype: the dtype that holds its values without loss.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, out: np.ndarray, start: int) -> None:
        """Fills a C-contiguous array [rows, ...] of the tensor's own dtype with the rows from `start` on."""
        raise NotImplementedError

    @property
    def stored(self) -> str:
        """The name of the storage format: a dtype, or a type of quantised blocks."""
        return str(self.dtype)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of_columns(self, columns: slice) -> "Tensor":
        """Some columns of a matrix as a tensor of their own. Its rows are read or computed whole, and then cut."""
        return _Columns(self.name, self.dtype, (self.rows, columns.stop - columns.start), self, columns)

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills an array [rows, ...] with the rows from `start` on, cast to the array's dtype.

        The array is C-contiguous, or for `of_columns` each of its rows is.
        """
        if out.dtype == self.dtype:
            self.read(out, start)
            return
        done = 0
        for block in self.blocks(start, start + len(out)):
            with np.errstate(over="ignore"):  # `convert` reports values that become infinite
                out[done : done + len(block)] = block
            done += len(block)

    def blocks(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The rows in order, about `BLOCK` bytes at a time; each array is overwritten by the next one.

        Args:
            start: the first row.
            stop: the row after the last; all rows by default.
            dtype: the arrays' dtype; the tensor's own by default.
        """
        stop = self.rows if stop is None else stop
        step = max(1, BLOCK * self.rows // max(1, self.nbytes))
        buffer = np.empty((min(step, stop - start), *self.shape[1:]), dtype or self.dtype)
        for first in range(start, stop, step):
            block = buffer[: min(step, stop - first)]
            self.read_into(block, first)
            yield block


@dataclass(frozen=True)
class _Columns(Tensor):
    """See `Tensor.of_columns`."""

    whole: Tensor
    columns: slice

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """See `Tensor.read_into`."""
        done = 0
        for block in self.whole.blocks(start, start + len(out), out.dtype):
            out[done : done + len(block)] = block[:, self.columns]
            done += len(block)


class ComputedTensor(Tensor):
    """A tensor whose values are computed in float32, and rounded once to the dtype of the array that they fill."""

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """See `Tensor.read_into`."""
        with np.errstate(over="ignore"):
            self.read(out, start)


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor in a file.

    Attributes:
        offset: bytes from the start of the file.
        pitch: bytes from one row to the next; None if the rows follow each other.
    """

    path: Path
    offset: int
    pitch: int | None = None

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        # As bytes: arrays of bfloat16 have no buffer that `preadv` could fill. Rows that follow each other are one run.
        runs = out.reshape(1, -1).view(np.uint8) if self.pitch is None else out.view(np.uint8)
        offset = self._offset_of(start)
        with self.path.open("rb", buffering=0) as file:
            for run in runs:
                if os.preadv(file.fileno(), [run.data], offset) < len(run):
                    self._read_in_parts(file.fileno(), run.data, offset)
                offset += self.pitch or 0

    def _read_in_parts(self, file: int, run: memoryview, offset: int) -> None:
        """Linux reads at most 2 GiB at a time; 0 bytes is the end of the file."""
        while run and (count := os.preadv(file, [run], offset)):
            run, offset = run[count:], offset + count
        if run:
            raise CheckpointError(f"{self.path} ended while `{self.name}` was read. Download it again.")

    def of_columns(self, columns: slice) -> "StoredTensor":
        """See `Tensor.of_columns`; only these columns are read, row by row."""
        shape = (self.rows, columns.stop - columns.start)
        offset = self.offset + columns.start * self.dtype.itemsize
        return replace(self, shape=shape, offset=offset, pitch=self.nbytes // max(1, self.rows))

    def part(self, name: str, start: int, rows: int) -> "StoredTensor":
        """The rows [start, start + rows) as a tensor with a name of its own."""
        return StoredTensor(name, self.dtype, (rows, *self.shape[1:]), self.path, self._offset_of(start))

    def _offset_of(self, row: int) -> int:
        return self.offset + row * (self.pitch or self.nbytes // max(1, self.rows))


def read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    """The tensors of a file in a folder, by name.

    Raises:
        CheckpointError: if the file is missing, not a safetensors file, or shorter or longer than its header says.
    """
    path = file_in(folder, name)
    try:
        text = header_text(path)
        header = parse_json(text)
        with safe_open(path, framework="numpy"):
            pass  # opening validates the header, its offsets and the length of the file
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). Download it again.") from error
    header.pop("__metadata__", None)
    if unreadable := sorted({entry["dtype"] for entry in header.values()} - set(_ALL)):
        raise CheckpointError(f"{path} holds tensors of dtype {unreadable}; jaxgen reads {list(STORED)}.")
    start = 8 + len(text.encode())
    return {
        name: StoredTensor(name, _ALL[entry["dtype"]], tuple(entry["shape"]), path, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def header_text(path: Path) -> str:
    """The JSON header of a file, with the spaces that pad it.

    Raises:
        CheckpointError: if there is none.
    """
    with path.open("rb") as file:
        start = file.read(64)
        refuse_placeholder(path, start)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= LARGEST_JSON:
            raise CheckpointError(
                f"{path} is not a safetensors file: it begins with {start[:16]!r}. Download it again."
            )
        file.seek(8)
        return file.read(length).decode()


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], kind: str) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data in a file of these tensors, and the offset in the file of each tensor.

    Args:
        tensors: dtype and shape by name, in the order of the data.
        kind: the framework that the metadata names, such as "pt".
    """
    entries: dict[str, object] = {"__metadata__": {"format": kind}}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    offsets = {name: 8 + len(encoded) + start for name, start in starts.items()}
    return struct.pack("<Q", len(encoded)) + encoded, offsets


def write(path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file from the dtypes and shapes of its tensors and, in the same order, an iterable of their values."""
    with path.open("wb") as file:
        file.write(header(tensors, "flax")[0])
        for _, array in zip(tensors, arrays, strict=True):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

"""Reading and writing safetensors one tensor at a time.

The `safetensors` package validates a file; the bytes are read with plain `readinto`, straight into their place. Its own
readers map the whole file into memory, which counts a second copy of the model against the process.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file or tensor, what is wrong, and the way out."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        offset: bytes from the start of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def chunks(self, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of the tensor, a few at a time."""
        left = int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left > 0:
                chunk = file.read(min(size, left))
                left -= len(chunk)
                yield chunk

    def read_into(self, out: np.ndarray) -> None:
        """Fills a C-contiguous array of the tensor's shape, casting to its dtype where they differ."""
        source = out if out.dtype == DTYPES[self.dtype] else np.empty(self.shape, DTYPES[self.dtype])
        view = source.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise CheckpointError(f"{self.path} ended while `{self.name}` was read. Download it again.")
        if source is not out:
            out[...] = source


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which must be whole.

    Raises:
        CheckpointError: if the file is missing, is no safetensors file, or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
                )
            with safe_open(path, framework="numpy"):
                pass  # opening validates the header, its offsets and the length of the file
            file.seek(0)
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. The checkpoint is incomplete; download it again.") from error
    except (OSError, SafetensorError, _DuplicateKey, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). Download it again.") from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write(path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes one file from the dtypes and shapes of its tensors and, in the same order, their values one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "flax"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        # The tensors come first in the zip: it must not take an array that belongs to the next file.
        for _, array in zip(tensors, arrays, strict=False):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(f"`{next(name for name in names if names.count(name) > 1)}` is there twice")
    return content

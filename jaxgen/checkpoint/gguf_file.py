"""GGUF, llama.cpp's format: one file with the tensors, the vocabulary, and metadata in place of configs.

The header is parsed here, because a wrong count in it would keep the `gguf` package's reader busy forever. The package
supplies block types and tensor names.

    "GGUF"  version (uint32)  number of tensors (uint64)  number of keys (uint64)
    keys    length (uint64) and text, type (uint32), value
    tensors length (uint64) and text, number of dimensions (uint32), dimensions (uint64, columns first), type (uint32),
            offset in the data (uint64)
    data    aligned to `general.alignment` bytes, like each tensor

In some families llama.cpp applies rotary embeddings to pairs of neighbouring rows of queries and keys. Hugging Face
pairs a row of the first half of a head with one of the second half.
"""

import importlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import numpy as np

from jaxgen.checkpoint.files import MOST_LAYERS, CheckpointError, Json, refuse_placeholder
from jaxgen.checkpoint.folder import listed
from jaxgen.checkpoint.safetensors_file import DTYPES, ComputedTensor, StoredTensor, Tensor
from jaxgen.models import FAMILIES
from jaxgen.models.family import Family, Gguf

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Limits against wrong numbers in the header. Vocabularies have up to 262,144 tokens, and twice as many merges; the
# header of such a file has 15 MB.
_LARGEST_HEADER, _MOST_ELEMENTS, _MOST_ENTRIES = 64 << 20, 1 << 20, 1 << 14
_LARGEST_BUFFER, _MOST_DIMENSIONS = 4096, 4

# The types of metadata, as `struct` writes them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

# general.sampling.*, which llama.cpp's converter copies from generation_config.json -> the fields there. Other keys
# keep their names, and `generate` warns that they are not read.
_SAMPLING: dict[str, tuple[str, type]] = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_repeat": ("repetition_penalty", float),
}
_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


class Content(NamedTuple):
    """A model as a Hugging Face folder would hold it.

    Attributes:
        raw: the content of config.json.
        generation: the content of generation_config.json.
        tensors: by their Hugging Face names.
    """

    raw: Json
    generation: Json
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class QuantisedTensor(ComputedTensor):
    """A tensor [rows, columns] of quantised blocks, which is dequantised to float32.

    Attributes:
        data: the same rows as bytes.
        kind: the type of its blocks, such as "Q4_K".
    """

    data: StoredTensor
    kind: str

    @property
    def stored(self) -> str:
        return self.kind

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        gguf, done = package(), 0
        for rows in self.data.blocks(start, start + len(out)):
            with np.errstate(over="ignore", invalid="ignore"):  # from NaN scales, which `convert` reports
                out[done : done + len(rows)] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.kind])
            done += len(rows)


@dataclass(frozen=True)
class HalvedTensor(ComputedTensor):
    """Another tensor with the rows of each head reordered, from pairs to halves. For a head of 6 rows:

        stored  0 1 2 3 4 5    pairs (0, 1) (2, 3) (4, 5)    ->    0 2 4 1 3 5

    Attributes:
        paired: the stored tensor.
        head: number of rows per head.
    """

    paired: Tensor
    head: int

    @property
    def stored(self) -> str:
        return self.paired.stored

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        for done in range(0, len(out), self.head):  # each part lies in at most two heads
            part = out[done : done + self.head]
            rows = np.arange(start + done, start + done + len(part))
            within = rows % self.head
            wanted = rows - within + 2 * (within % (self.head // 2)) + within // (self.head // 2)
            first = wanted.min()
            buffer = np.empty((wanted.max() + 1 - first, *self.shape[1:]), self.dtype)
            self.paired.read(buffer, first)
            part[...] = buffer[wanted - first]


def is_gguf(path: Path) -> bool:
    """Whether a path is a regular file whose name ends in .gguf or whose first bytes are "GGUF"."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:  # not readable
        return False


def package() -> ModuleType:
    """The `gguf` package, which is only needed for these files."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError("reading GGUF needs the gguf package: `pip install 'jaxgen[gguf]'`.") from error


def read(path: Path) -> Content:
    """Reads a file as the Hugging Face folder that it could have been made from. Tensor values are read later.

    Raises:
        CheckpointError: if the file is broken, or if its model or its tensor types are not supported.
    """
    metadata, tensors = _read_header(path)
    architecture = metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        known = [name for name, each in FAMILIES.items() if each.gguf]
        raise CheckpointError(
            f"{path} has the architecture {architecture!r:.100}, which is not supported; it may be one of {known}."
        )
    try:
        _check_general(metadata)
        return _content(family.gguf, metadata, tensors)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file: numbers, strings and lists by key.

    Raises:
        CheckpointError: if the file is broken.
    """
    return _read_header(path)[0]


def _content(rules: Gguf[Any], metadata: Json, tensors: dict[str, Tensor]) -> Content:
    """See `read`; for `rules` see `Family.gguf`."""
    architecture = metadata["general.architecture"]
    tokens, prefix = metadata.get("tokenizer.ggml.tokens"), f"{architecture}."
    sizes: dict[str, Any] = {"vocab_size": len(tokens) if isinstance(tokens, list) else 0}
    sizes |= {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    layers = sizes.get("block_count")
    if not _is_count(layers) or not 1 <= layers <= min(len(tensors), MOST_LAYERS):
        raise ValueError(
            f"`{prefix}block_count`={layers!r:.100} must be an integer from 1 to the number of its tensors, "
            f"{len(tensors)}, and at most {MOST_LAYERS}."
        )
    buffers = {name: _buffer(tensors.pop(name)) for name in rules.buffers if name in tensors}
    raw = dict(rules.config(sizes, tensors.keys(), buffers))
    generation: dict[str, Any] = {field: _token_id(metadata, key) for key, field in _TOKEN_IDS.items()}
    raw |= generation
    for key in [key for key in metadata if key.startswith("general.sampling.")]:
        value, name = metadata[key], key.removeprefix("general.sampling.")
        field, kind = _SAMPLING.get(name, (name, type(value)))
        if type(value) is not kind:
            raise ValueError(f"`{key}`={value!r:.100} must be of type {kind.__name__}.")
        generation[field] = value
    generation = {field: value for field, value in generation.items() if value is not None}
    family = FAMILIES[raw["model_type"]]
    config = family.config(raw, frozenset())
    names = _names(family, config, architecture, layers)
    if unknown := sorted(tensors.keys() - names.keys()):
        raise ValueError(f"it holds {listed(unknown)}, which a {architecture} model does not use.")
    renamed = {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}
    for name, heads in rules.paired(config, [*renamed]).items():
        tensor = renamed[name]
        if tensor.rows % (2 * heads):
            raise ValueError(f"`{name}` has {tensor.rows} rows, which cannot be pairs in {heads} heads.")
        renamed[name] = HalvedTensor(name, tensor.dtype, tensor.shape, tensor, tensor.rows // heads)
    return Content(raw, generation, renamed)


def _names(family: Family, config: Any, architecture: str, layers: int) -> dict[str, str]:
    """The Hugging Face names of all tensors that the model may have, by their names in the file."""
    gguf = package()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        raise ValueError(f"the gguf package is too old for a {architecture} model: `pip install -U 'jaxgen[gguf]'`.")
    table = gguf.get_tensor_name_map(numbers[architecture], layers)
    sources = family.weight_map(replace(config, tie_word_embeddings=False)).values()
    return {table.get_name(name, (".weight", ".bias")): name for names in sources for name in names}


def _check_general(metadata: Json) -> None:
    """Raises ValueError for a part of a split model, and for other kinds of files, such as adapters."""
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(
            f"the file is one of {parts!r:.100} parts of a model. Merge them with llama.cpp: `llama-gguf-split --merge "
            "FIRST-PART OUT.gguf`."
        )
    for key, value in (("general.type", "model"), ("general.quantization_version", 2)):
        if metadata.get(key, value) != value:
            raise ValueError(f"`{key}`={metadata[key]!r:.100} is not supported; it may be {value!r}.")


def _token_id(metadata: Json, key: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is not None and not _is_count(value):
        raise ValueError(f"`tokenizer.ggml.{key}_token_id`={value!r:.100} must be an integer.")
    return value


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 31


def _buffer(tensor: Tensor) -> np.ndarray:
    """The float32 values of a small tensor."""
    if len(tensor.shape) != 1 or tensor.rows > _LARGEST_BUFFER:
        raise ValueError(
            f"`{tensor.name}` has shape {tensor.shape}, but must be a vector of at most {_LARGEST_BUFFER} numbers."
        )
    values = np.empty(tensor.shape, np.float32)
    tensor.read_into(values)
    return values


# The header


class _Header:
    """Reads values from the header of a file, within limits."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._limit, self.position = file, min(size, _LARGEST_HEADER), 0

    def take(self, count: int) -> bytes:
        if count > self._limit - self.position:
            raise ValueError(f"its header does not end within {self._limit} bytes")
        self.position += count
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError("the file ended while it was read")
        return data

    def number(self, kind: str) -> Any:
        """A number in a format of `struct`. A float32 is read as its shortest decimal: 1e-05, not 9.9999997e-06."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        if kind in "fd" and not math.isfinite(value):
            raise ValueError(f"it holds the number {value}")
        return float(str(np.float32(value))) if kind == "f" else value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind not in (*_NUMBERS, _TEXT) or count > _MOST_ELEMENTS:
            raise ValueError(f"it holds a list of {count} values of type {kind}; the limit is {_MOST_ELEMENTS}")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        item = f"<{_NUMBERS[kind]}"
        return [value for (value,) in struct.iter_unpack(item, self.take(count * struct.calcsize(item)))]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file, by their names in the file.

    Raises:
        CheckpointError: see `read`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            refuse_placeholder(path, file.read(64))
            file.seek(0)
            return _walk(path, _Header(file, size), size)
    except CheckpointError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF ({error}). Download it again.") from error


def _walk(path: Path, header: _Header, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (magic := header.take(4)) != _MAGIC:
        raise ValueError(f"it begins with {magic!r}")
    if (version := header.number("I")) not in _VERSIONS:
        order = " in big-endian order" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path} is GGUF of version {version >> 24 if order else version}{order}; jaxgen reads the versions "
            f"{_VERSIONS} in little-endian order. Convert the original model again."
        )
    count, keys = header.number("Q"), header.number("Q")
    if max(count, keys) > _MOST_ENTRIES:
        raise ValueError(f"it claims to hold {count} tensors and {keys} keys; the limit is {_MOST_ENTRIES}")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        if (key := header.text()) in metadata:
            raise ValueError(f"`{key:.100}` appears twice")
        metadata[key] = header.value()
    entries: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        if (name := header.text()) in entries:
            raise ValueError(f"`{name:.100}` appears twice")
        if not 1 <= (dimensions := header.number("I")) <= _MOST_DIMENSIONS:
            raise ValueError(f"`{name:.100}` has {dimensions} dimensions, but must have 1 to {_MOST_DIMENSIONS}")
        shape = [header.number("Q") for _ in range(dimensions)][::-1]
        entries[name] = shape, header.number("I"), header.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if not _is_count(alignment) or alignment.bit_count() != 1:
        raise ValueError(f"`general.alignment`={alignment!r:.100} is not a power of two")
    start = header.position + -header.position % alignment
    end, tensors = 0, {}
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        tensor, nbytes = _tensor(path, name, tuple(shape), kind, start + offset)
        if offset % alignment or offset < end or start + offset + nbytes > size:
            raise ValueError(
                f"`{name:.100}` is not aligned, overlaps another tensor or extends beyond the end of the file"
            )
        end, tensors[name] = offset + nbytes, tensor
    return metadata, {name: tensors[name] for name in entries}


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> tuple[Tensor, int]:
    """A tensor, and its number of bytes in the file."""
    gguf = package()
    try:
        code = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"`{name:.100}` is of the unknown type {kind}") from None
    if code.name not in (*DTYPES, *_QUANTISED):
        raise CheckpointError(
            f"{path}: `{name:.100}` is of type {code.name}; jaxgen reads {listed([*DTYPES, *_QUANTISED], most=20)}. "
            "Download the model in one of these types."
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[code]
    *rows, columns = shape
    if not all(shape) or math.prod(shape) >= 1 << 62 or columns % block:
        raise ValueError(f"`{name:.100}` has shape {shape}, which {code.name} cannot have")
    width = columns // block * block_bytes
    nbytes = math.prod(rows) * width
    if code.name in DTYPES:
        return StoredTensor(name, DTYPES[code.name], shape, path, offset), nbytes
    if not rows:
        raise ValueError(f"`{name:.100}` is quantised as {code.name}, but has one dimension, and needs two")
    data = StoredTensor(name, np.dtype(np.uint8), (*rows, width), path, offset)
    return QuantisedTensor(name, np.dtype(np.float32), shape, data, code.name), nbytes

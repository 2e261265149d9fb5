"""GGUF files that were broken by hand or made to do harm: one sentence, at once, and no memory for what they claim."""

import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import tensor_shapes
from checkpoints import CONFIG
from gguf_models import sizes, write_gguf
from mutations import attempt

from jaxgen.checkpoint.gguf_file import package

MEGABYTES = 8
LARGE = 2**63


def packed(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, value: Any, kind: int | None = None) -> bytes:
    """A key and its value: text, bool, float, int, or bytes as they are."""
    kinds = {str: 8, bool: 7, float: 6, int: 4}
    kind = kinds[type(value)] if kind is None else kind
    form = {7: "<?", 6: "<f", 4: "<I", 10: "<Q", 12: "<d"}.get(kind)
    data = value if isinstance(value, bytes) else packed(value) if form is None else struct.pack(form, value)
    return packed(key) + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


@dataclass
class Entry:
    """A tensor in the header."""

    name: str | bytes
    shape: tuple[int, ...]
    kind: int = 0
    offset: int = 0
    dimensions: int | None = None

    def encoded(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        shape = struct.pack(f"<{len(self.shape)}Q", *reversed(self.shape))
        return packed(self.name) + struct.pack("<I", count) + shape + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class File:
    """A file in parts; it is whole as long as none is changed."""

    keys: list[bytes]
    tensors: list[Entry]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    order: str = "<"
    key_count: int | None = None
    tensor_count: int | None = None

    def encoded(self) -> bytes:
        counts = [
            len(given) if count is None else count
            for given, count in ((self.tensors, self.tensor_count), (self.keys, self.key_count))
        ]
        header = self.magic + struct.pack(f"{self.order}IQQ", self.version, *counts)
        header += b"".join(self.keys) + b"".join(tensor.encoded() for tensor in self.tensors)
        return header + bytes(-len(header) % 32) + self.data


def whole() -> File:
    config = CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": 4}
    names = package().get_tensor_name_map(package().MODEL_ARCH.LLAMA, 1)
    tensors, end = [], 0
    for name, shape in tensor_shapes(config).items():
        tensors.append(Entry(names.get_name(name, (".weight",)), tuple(shape), offset=end))
        end += -(-4 * int(np.prod(shape)) // 32) * 32
    keys = [entry("general.architecture", "llama")]
    keys += [entry(key, value) for key, value in sizes("llama", config).items()]
    return File(keys, tensors, np.ones(end // 4, np.float32).tobytes())


Change = Callable[[File], File | bytes]


def key(name: str | bytes, value: Any, kind: int | None = None) -> Change:
    """One key more, or in the place of one."""

    def change(file: File) -> File:
        others = [each for each in file.keys if not each.startswith(packed(name))]
        return replace(file, keys=[*others, entry(name, value, kind)])

    return change


def without(name: str) -> Change:
    return lambda file: replace(file, keys=[each for each in file.keys if not each.startswith(packed(name))])


def tensor(number: int = 0, **changes: Any) -> Change:
    def change(file: File) -> File:
        tensors = [*file.tensors]
        tensors[number] = replace(tensors[number], **changes)
        return replace(file, tensors=tensors)

    return change


def parts(**changes: Any) -> Change:
    return lambda file: replace(file, **changes)


def cut(size: int) -> Change:
    return lambda file: file.encoded()[:size]


def content(data: bytes) -> Change:
    return lambda file: data


BROKEN: dict[str, Change] = {
    # what is no file of the format
    "of zero bytes": content(b""),
    "of zeros": content(bytes(5000)),
    "a web page": content(b"<!DOCTYPE html><html>404</html>"),
    "a pointer of Git LFS": content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "a zip": content(b"PK\x03\x04" + bytes(3000)),
    "the old format": content(b"tjgg" + bytes(3000)),
    "only the magic": cut(4),
    "version 0": parts(version=0),
    "version 1": parts(version=1),
    "version 4": parts(version=4),
    "the largest version": parts(version=2**32 - 1),
    "big-endian": parts(order=">"),
    # cut short
    "cut in its version": cut(6),
    "cut in its counts": cut(20),
    "cut after its counts": cut(24),
    "cut in the length of a key": cut(28),
    "cut in a key": cut(40),
    "cut in the type of a value": cut(54),
    "cut in a value": cut(62),
    "cut in its keys": cut(200),
    "cut in its tensors": lambda file: file.encoded()[: -len(file.data) - 200],
    "cut before its data": lambda file: file.encoded()[: -len(file.data)],
    "cut in its data": cut(3000),
    "cut by a byte": lambda file: file.encoded()[:-1],
    "without data": parts(data=b""),
    # counts that lie
    "no keys": parts(keys=[]),
    "no tensors": parts(tensors=[]),
    "a key too few": lambda file: replace(file, key_count=len(file.keys) - 1),
    "a key too many": lambda file: replace(file, key_count=len(file.keys) + 1),
    "endless keys": parts(key_count=2**64 - 1),
    "a tensor too few": lambda file: replace(file, tensor_count=len(file.tensors) - 1),
    "a tensor too many": lambda file: replace(file, tensor_count=len(file.tensors) + 1),
    "endless tensors": parts(tensor_count=2**64 - 1),
    "more tensors than there can be": parts(tensor_count=100_000),
    # lists
    "list of endless bytes": key("general.x", array(0, 2**60), 9),
    "list of endless numbers": key("general.x", array(10, 2**64 - 1), 9),
    "list beyond the file": key("general.x", array(4, 100_000), 9),
    "list of endless texts": key("general.x", array(8, 2**60), 9),
    "list of more texts than there are": key("general.x", array(8, 900_000, packed("a")), 9),
    "list of more texts than a vocabulary has": key("general.x", array(8, 1 << 21, bytes(8 << 21)), 9),
    "more keys than there can be": lambda file: replace(
        file, keys=[*file.keys, *(entry(f"general.{number}", 1) for number in range(20_000))]
    ),
    "list of lists": key("general.x", array(9, 1, array(4, 1, bytes(4))), 9),
    "list of lists of lists": key("general.x", array(9, 2**32, array(9, 2**32)), 9),
    "list of an unknown type": key("general.x", array(13, 1, bytes(8)), 9),
    # keys and values
    "endless key": lambda file: replace(file, keys=[struct.pack("<Q", 2**64 - 1) + b"a", *file.keys]),
    "key beyond the file": lambda file: replace(file, keys=[struct.pack("<Q", 10**6) + b"a", *file.keys]),
    "key that is not UTF-8": key(b"general.\xff\xfe", 3),
    "text that is not UTF-8": key("general.name", packed(b"\xff\xfe"), 8),
    "endless text": key("general.name", struct.pack("<Q", 2**62), 8),
    "value of an unknown type": key("general.name", bytes(8), 13),
    "value of the largest type": key("general.name", bytes(8), 2**32 - 1),
    "key that appears twice": lambda file: replace(file, keys=[*file.keys, file.keys[0]]),
    "number that is none": key("llama.rope.freq_base", float("nan")),
    "infinite number": key("llama.attention.layer_norm_rms_epsilon", float("inf")),
    "infinite double": key("general.sampling.temp", float("inf"), 12),
    # the architecture
    "no architecture": without("general.architecture"),
    "architecture that is a number": key("general.architecture", 7),
    "architecture that is a list": key("general.architecture", array(4, 1, bytes(4)), 9),
    "architecture of the command line": key("general.architecture", "../../etc/passwd"),
    "part of a model": key("split.count", 5),
    "parts that are text": key("split.count", "many"),
    # sizes
    "no layers": key("llama.block_count", 0),
    "endless layers": key("llama.block_count", 2**32 - 1),
    "more layers than tensors": key("llama.block_count", 200),
    "layers that are text": key("llama.block_count", "1"),
    "layers that are true": key("llama.block_count", True),
    "layers that are missing": without("llama.block_count"),
    "no heads": key("llama.attention.head_count", 0),
    "endless heads": key("llama.attention.head_count", LARGE, 10),
    "heads that divide nothing": key("llama.attention.head_count", 7),
    "no heads of keys": key("llama.attention.head_count_kv", 3),
    "heads by layer": key("llama.attention.head_count", array(4, 1, struct.pack("<I", 4)), 9),
    "endless heads' size": key("llama.attention.key_length", LARGE, 10),
    "heads' size that is text": key("llama.attention.key_length", "8"),
    "endless width": key("llama.embedding_length", LARGE, 10),
    "endless vocabulary": key("llama.vocab_size", LARGE, 10),
    "vocabulary that is text": key("llama.vocab_size", "4"),
    "endless context": key("llama.context_length", LARGE, 10),
    "negative epsilon": key("llama.attention.layer_norm_rms_epsilon", -1.0),
    "rope of nothing": key("llama.rope.freq_base", 0.0),
    "rope that is text": key("llama.rope.freq_base", "10000"),
    "tokens that are one number": lambda file: key("tokenizer.ggml.tokens", 5)(without("llama.vocab_size")(file)),
    "endless bos": key("tokenizer.ggml.bos_token_id", LARGE, 10),
    "sampling that is text": key("general.sampling.top_k", "\0"),
    # alignment
    "alignment of zero": key("general.alignment", 0),
    "alignment of three": key("general.alignment", 3),
    "endless alignment": key("general.alignment", LARGE, 10),
    "alignment that is text": key("general.alignment", "32"),
    "alignment of others": key("general.alignment", 4096),
    # tensors
    "tensor of no dimensions": tensor(dimensions=0, shape=()),
    "tensor of five dimensions": tensor(shape=(1, 1, 1, 4, 32)),
    "tensor of endless dimensions": tensor(dimensions=2**32 - 1),
    "tensor of a dimension of zero": tensor(shape=(0, 32)),
    "tensor of an endless dimension": tensor(shape=(2**64 - 1, 32)),
    "tensor of overflowing dimensions": tensor(shape=(2**32, 2**32)),
    "tensor whose rows are columns": tensor(shape=(32, 4)),
    "tensor of an unknown type": tensor(kind=99),
    "tensor of a type that was removed": tensor(kind=4),
    "tensor of the largest type": tensor(kind=2**32 - 1),
    "tensor of a type that is not read": tensor(kind=20),
    "blocks that do not divide": tensor(kind=12),
    "blocks in one dimension": lambda file: tensor(
        [each.name for each in file.tensors].index("output_norm.weight"), kind=8
    )(file),
    "tensor that is not aligned": lambda file: tensor(-1, offset=file.tensors[-1].offset + 4)(
        replace(file, data=file.data + bytes(32))
    ),
    "tensor over another": tensor(1, offset=0),
    "tensor beyond the file": tensor(offset=2**40),
    "tensor beyond all files": tensor(offset=2**64 - 32),
    "tensor that ends beyond the file": tensor(shape=(4000, 32)),
    "name that appears twice": lambda file: replace(file, tensors=[*file.tensors, file.tensors[0]]),
    "name that is not UTF-8": tensor(name=b"\xff\xfe"),
    "name of nothing": tensor(name=""),
    "endless name": tensor(name="a" * 100_000),
    "name of another": tensor(name="model.embed_tokens.weight"),
    "factors of millions": lambda file: replace(
        file,
        tensors=[*file.tensors, Entry("rope_freqs.weight", (1 << 22,), offset=len(file.data))],
        data=file.data + bytes(4 << 22),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the first file needs, so that the memory of later ones is their own."""
    attempt(write_gguf(tmp_path_factory.mktemp("first") / "model.gguf"))


def refused(path: Path) -> bool:
    """Whether it is refused, in little memory."""
    tracemalloc.start()
    try:
        return not attempt(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEGABYTES << 20, peak


def test_the_file_is_whole_before_it_is_broken(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(whole().encoded())
    assert not refused(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(replace(whole(), version=2).encoded())
    assert not refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused_at_once_in_one_sentence(how: str, tmp_path: Path) -> None:
    broken, path = BROKEN[how](whole()), tmp_path / "model.gguf"
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encoded())
    assert refused(path)


def test_there_are_sixty_of_them() -> None:
    assert len(BROKEN) >= 60


def test_what_was_changed_at_random_loads_or_is_refused(tmp_path: Path) -> None:
    rng, path, loaded = random.Random(0), write_gguf(tmp_path / "model.gguf"), 0
    good = path.read_bytes()
    size = good.index(b"output_norm.weight") + 60
    warnings.simplefilter("ignore")
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(size)
            if rng.random() < 0.7:
                broken[place] ^= 1 << rng.randrange(8)
            else:
                broken[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        path.write_bytes(broken)
        loaded += attempt(path)
    assert 0 < loaded < 150

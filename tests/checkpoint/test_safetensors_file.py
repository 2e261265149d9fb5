"""Every bit arrives, wherever it was written; a file that is not whole is refused by its name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensors, write_safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxgen import CheckpointError
from jaxgen.checkpoint.safetensors_file import BLOCK, StoredTensor, read_header, write


def every_value(dtype: type) -> np.ndarray:
    """All 16-bit patterns of a dtype, NaN payloads, subnormals and negative zero among them."""
    patterns = np.arange(2**16, dtype=np.uint16)
    if np.dtype(dtype).itemsize == 4:
        return (patterns.astype(np.uint32) * 65537).view(dtype)
    return patterns.view(dtype)


@pytest.fixture
def tensors() -> Tensors:
    return {
        "a": np.arange(12, dtype=np.float32).reshape(4, 3),
        "b": every_value(np.float16).reshape(256, 256),
        "c": every_value(ml_dtypes.bfloat16),
        "d": every_value(np.float32).reshape(16, 16, 256),
        "odd": np.arange(3, dtype=np.float16),
        "scalar": np.array(7, np.float32),
        "none": np.zeros((0, 5), np.float32),
    }


def read(path: Path) -> Tensors:
    found = {}
    for name, tensor in read_header(path.parent, path.name).items():
        found[name] = np.empty(tensor.shape, tensor.dtype)
        tensor.read_into(found[name].reshape(tensor.rows, *tensor.shape[1:]))
    return found


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


def test_files_of_the_safetensors_package_are_read_bit_for_bit(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_equal(read(tmp_path / "x.safetensors"), tensors)


def test_the_safetensors_package_reads_what_is_written_bit_for_bit(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {name: (array.dtype, array.shape) for name, array in tensors.items()}, iter(tensors.values()))
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "flax"}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    assert_equal(read(path), tensors)


def test_the_data_of_a_written_file_is_aligned(tmp_path: Path) -> None:
    for width in range(1, 9):
        path = tmp_path / "x.safetensors"
        write(path, {"n" * width: (np.dtype(np.float32), (2,))}, [np.ones(2, np.float32)])
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_is_cast_into_its_rows_and_nowhere_else(target: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"pad": np.ones(5, np.float16), "a": values})
    out = np.full((5, 3), 9, target)
    read_header(tmp_path, "x.safetensors")["a"].read_into(out[1:3])
    np.testing.assert_array_equal(out[1:3], values.astype(target))
    np.testing.assert_array_equal(out[[0, 3, 4]], np.full((3, 3), 9, target))


@pytest.mark.parametrize("shape", [(5, 100_000), (3, 400_000), (700_000,)], ids=str)
def test_a_tensor_larger_than_a_block_arrives_whole_in_any_dtype_and_from_any_row(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Rows of less than a block, of more, and of one number."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"pad": np.ones(5, np.float16), "a": values})
    tensor = read_header(tmp_path, "x.safetensors")["a"]
    assert tensor.nbytes > 1.5 * BLOCK
    for dtype in (np.float32, ml_dtypes.bfloat16):
        out = np.empty((len(values) - 1, *shape[1:]), dtype)
        tensor.read_into(out, 1)
        np.testing.assert_array_equal(out, values[1:].astype(dtype))
        blocks = [block.copy() for block in tensor.blocks(1, dtype=np.dtype(dtype))]
        assert len(blocks) > 1
        np.testing.assert_array_equal(np.concatenate(blocks), out)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(64, np.float32)})
    tensor = read_header(path.parent, path.name)["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"x\.safetensors ended while `a`"):
        tensor.read_into(np.empty(64, np.float32))


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(5, ml_dtypes.bfloat16)})
    start = path.stat().st_size - 34
    assert read_header(path.parent, path.name) == {
        "a": StoredTensor("a", np.dtype(np.float32), (2, 3), path, start),
        "b": StoredTensor("b", np.dtype(ml_dtypes.bfloat16), (5,), path, start + 24),
    }


def with_header(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """Rewrites the header of a file and leaves its data."""

    def rewrite(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = change(content[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return rewrite


@pytest.mark.parametrize(
    ("break_file", "reason"),
    [
        pytest.param(lambda content: b"", "begins with zeros", id="zero bytes"),
        pytest.param(lambda content: content[:7], "is not a safetensors file", id="ends in the length"),
        pytest.param(lambda content: content[:40], "cannot be read", id="ends in the header"),
        pytest.param(lambda content: content[:-1], "cannot be read", id="lacks a byte"),
        pytest.param(lambda content: content + b"\0", "cannot be read", id="has a byte too many"),
        pytest.param(lambda content: bytes(len(content)), "begins with zeros", id="zeros"),
        pytest.param(lambda content: b"<!DOCTYPE html><title>404</title>", "is not a safetensors file", id="HTML page"),
        pytest.param(lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="LFS pointer"),
        pytest.param(
            lambda content: struct.pack("<Q", 2**63) + content[8:], "is not a safetensors file", id="endless header"
        ),
        pytest.param(with_header(lambda text: text[:-1]), "cannot be read", id="bad JSON"),
        pytest.param(with_header(lambda text: "[" * 10000), "cannot be read", id="deep JSON"),
        pytest.param(with_header(lambda text: text.replace("F32", "F33", 1)), "cannot be read", id="unknown dtype"),
        pytest.param(with_header(lambda text: text.replace("[0,", "[4,", 1)), "cannot be read", id="hole"),
        pytest.param(with_header(lambda text: text.replace("[16,", "[8,", 1)), "cannot be read", id="overlap"),
        pytest.param(
            with_header(lambda text: text.replace("[4]", "[5]", 1)), "cannot be read", id="shape beyond the data"
        ),
        pytest.param(
            with_header(lambda text: f'{{"a": {json.dumps(json.loads(text)["a"])}, {text[1:]}'), "twice", id="twice"
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_its_name(
    break_file: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(4, np.float32), "b": np.ones(2, np.float32)})
    path.write_bytes(break_file(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"(?s)(?=.*x\.safetensors)(?=.*{reason})"):
        read_header(path.parent, path.name)


def test_a_missing_file_and_a_folder_in_its_place_are_refused_by_their_name(tmp_path: Path) -> None:
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            read_header(path.parent, path.name)

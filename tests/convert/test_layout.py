"""Which tensor goes where in which file, on the way to a converted folder and back, before anything is written."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, write_checkpoint
from jaxgen.convert import convert_checkpoint, read_manifest
from jaxgen.convert.layout import (
    SHARD_BYTES,
    File,
    Piece,
    hugging_face_files,
    hugging_face_tensors,
    index,
    manifest,
    native_files,
)
from layouts import BF16, F16, F32, FREQUENCIES, TIED, mixed

from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.safetensors_file import Tensor
from jaxgen.checkpoint.source import Source, open_checkpoint

SINGLE = ["model-00001-of-00001.safetensors"]
QKV = "layers.0.self_attn.qkv_proj.weight"
Q, K, V = (f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkv")
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of two files."""
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("source") / "model", shards=2))


@pytest.fixture(scope="module")
def native(source: Source) -> Source:
    """The same, converted."""
    return open_checkpoint(convert_checkpoint(source.folder, source.folder.parent / "converted").folder)


def opened(folder: Path, *args: Any, **kwargs: Any) -> Source:
    return open_checkpoint(write_checkpoint(folder, *args, **kwargs))


@dataclass(frozen=True)
class Counted(Tensor):
    """A tensor of no values."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def entries(file: File) -> dict[str, Any]:
    """What the header of a file says, but for the metadata."""
    length = int.from_bytes(file.header[:8], "little")
    assert len(file.header) == 8 + length
    return {name: entry for name, entry in json.loads(file.header[8:]).items() if name != "__metadata__"}


def metadata(file: File) -> Any:
    return json.loads(file.header[8:])["__metadata__"]


def names(files: list[File]) -> list[str]:
    return [name for file in files for name in entries(file)]


# ---- Sizes ----


def test_a_piece_takes_as_many_bytes_as_its_values_have_in_the_dtype_they_are_written_in() -> None:
    tensor = Counted("x", np.dtype(F32), (3, 5))
    assert [Piece(tensor, np.dtype(each), 0).nbytes for each in (F32, F16, BF16, np.float64)] == [60, 30, 30, 120]
    assert Piece(Counted("x", np.dtype(BF16), (3, 5)), np.dtype(F32), 0).nbytes == 60
    assert Piece(Counted("x", np.dtype(F32), ()), np.dtype(F16), 0).nbytes == 2
    assert Piece(Counted("x", np.dtype(F32), (0, 5)), np.dtype(F16), 0).nbytes == 0


def test_a_file_is_its_header_and_its_pieces() -> None:
    tensor = Counted("x", np.dtype(F32), (3, 5))
    file = File("x.safetensors", b"12345678", [Piece(tensor, np.dtype(F32), 8), Piece(tensor, np.dtype(F16), 68)])
    assert file.nbytes == 8 + 60 + 30


# ---- There ----


@pytest.mark.parametrize("dtype", [None, F32, BF16], ids=["its own dtype", "the same one", "another"])
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 9000])
def test_the_pieces_fill_each_file_behind_its_header_without_gaps(shard_bytes: int, dtype: Any, source: Source) -> None:
    files = native_files(source, None if dtype is None else np.dtype(dtype), shard_bytes)
    written = np.dtype(dtype or F32)
    for file in files:
        end = len(file.header)
        assert end % 8 == 0
        for piece in file.pieces:
            assert (piece.offset, piece.dtype) == (end, written)
            end += piece.nbytes
        assert end == file.nbytes
        begun = len(file.header)
        for entry in entries(file).values():
            assert entry["dtype"] == {4: "F32", 2: "BF16"}[written.itemsize]
            start, stop = entry["data_offsets"]
            assert (begun, stop - start) == (start + len(file.header), np.prod(entry["shape"]) * written.itemsize)
            begun = stop + len(file.header)
        assert begun == file.nbytes and metadata(file) == {"format": "flax"}


def test_a_fused_parameter_is_its_tensors_one_behind_the_other(source: Source) -> None:
    (file,) = native_files(source, None, SHARD_BYTES)
    entry = entries(file)[QKV]
    assert entry["shape"] == [32 + 16 + 16, 32]
    own = [piece for piece in file.pieces if piece.tensor.name in (Q, K, V)]
    assert [piece.tensor.name for piece in own] == [Q, K, V]
    start = len(file.header) + entry["data_offsets"][0]
    assert [piece.offset - start for piece in own] == [0, 4 * 32 * 32, 4 * (32 + 16) * 32]


@pytest.mark.parametrize("shard_bytes", [1, 8192, 12_000, 20_000, 60_000])
def test_a_file_is_closed_by_the_tensor_that_would_make_it_too_large(shard_bytes: int, source: Source) -> None:
    whole = native_files(source, None, SHARD_BYTES)
    files = native_files(source, None, shard_bytes)
    assert names(files) == names(whole)
    sizes = [[end - start for start, end in (each["data_offsets"] for each in entries(f).values())] for f in files]
    for own, following in zip(sizes, [*sizes[1:], None], strict=True):
        assert sum(own) <= shard_bytes or len(own) == 1
        assert following is None or sum(own) + following[0] > shard_bytes
    count = len(files)
    assert [file.name for file in files] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def test_a_file_may_be_as_large_as_the_limit_and_no_larger(source: Source) -> None:
    (whole,) = native_files(source, None, SHARD_BYTES)
    limit = [*entries(whole).values()][2]["data_offsets"][1]
    for size, tensors in ((limit, 3), (limit - 1, 2)):
        assert len(entries(native_files(source, None, size)[0])) == tensors


def test_a_single_file_is_numbered_all_the_same(source: Source) -> None:
    assert [file.name for file in native_files(source, None, SHARD_BYTES)] == SINGLE


def test_parameters_of_several_dtypes_are_written_tensor_by_tensor_unless_one_is_asked_for(tmp_path: Path) -> None:
    source = opened(tmp_path, tensors=mixed([BF16, F16, F32, F16, BF16]))
    assert {part.dtype for part in source.pieces[QKV]} > {np.dtype(BF16)}
    (file,) = native_files(source, None, SHARD_BYTES)
    apart = {name: entry for name, entry in entries(file).items() if name.startswith(QKV)}
    known = {"F32": F32, "F16": F16, "BF16": BF16}
    assert [*apart] == [f"{QKV}.{number}" for number in range(3)]
    for entry, part in zip(apart.values(), source.pieces[QKV], strict=True):
        assert (np.dtype(known[entry["dtype"]]), entry["shape"]) == (part.dtype, [*part.shape])
    (file,) = native_files(source, np.dtype(F16), SHARD_BYTES)
    assert entries(file)[QKV]["dtype"] == "F16" and f"{QKV}.0" not in entries(file)


def test_buffers_come_last_under_their_names_and_keep_their_dtype(tmp_path: Path) -> None:
    source = opened(tmp_path, tensors={BUFFER: FREQUENCIES} | random_tensors())
    (file,) = native_files(source, np.dtype(F16), SHARD_BYTES)
    assert [*entries(file)][-1] == BUFFER
    assert entries(file)[BUFFER]["dtype"] == "F32" and {each["dtype"] for each in entries(file).values()} > {"F16"}


# ---- The index and the manifest ----


def test_an_index_says_which_file_holds_what_and_the_bytes_of_all(source: Source) -> None:
    files = native_files(source, None, 12_000)
    content = json.loads(index(files))
    assert content["metadata"]["total_size"] == sum(array.nbytes for array in random_tensors().values())
    assert content["weight_map"] == {name: file.name for file in files for name in entries(file)}
    assert len(files) > 1 and index(files).endswith("}\n")


def test_a_manifest_keeps_the_headers_and_the_index_of_tensors_that_kept_their_bytes(source: Source) -> None:
    content = json.loads(manifest(source, {"a": "1"}, {"config.json": "2"}, exact=True))
    assert (content["format"], content["copies"]) == (2, {})
    assert content["sha256"] == {"tensors": {"a": "1"}, "files": {"config.json": "2"}}
    assert content["parameters"][QKV] == [Q, K, V]
    assert content["source"]["index"] == (source.folder / "model.safetensors.index.json").read_text()
    for name, text in content["source"]["headers"].items():
        assert (source.folder / name).read_bytes()[8:].startswith(text.encode()) and text.endswith("}")
    assert [*content["source"]["headers"]] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_a_manifest_has_no_index_of_one_file_and_nothing_of_tensors_that_changed(
    source: Source, tmp_path: Path
) -> None:
    single = opened(tmp_path)
    origin = json.loads(manifest(single, {}, {}, exact=True))["source"]
    assert origin["index"] is None and [*origin["headers"]] == ["model.safetensors"]
    assert "source" not in json.loads(manifest(single, {}, {}, exact=False))
    computed = Counted(Q, np.dtype(F32), (32, 32))
    pieces = {**source.pieces, QKV: [computed, *source.pieces[QKV][1:]]}
    assert "source" not in json.loads(manifest(replace(source, pieces=pieces), {}, {}, exact=True))


# ---- And back ----


def test_the_tensors_have_their_names_and_values_again(native: Source) -> None:
    tensors = hugging_face_tensors(native, read_manifest(native.folder))
    expected = random_tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        found = np.empty(tensor.shape, tensor.dtype)
        tensor.read_into(found)
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


def test_a_head_that_is_the_embedding_once_more_has_its_name_again(tmp_path: Path) -> None:
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = convert_checkpoint(write_checkpoint(tmp_path / "source", TIED, tensors), tmp_path / "converted").folder
    known = read_manifest(folder)
    assert known["copies"] == {"lm_head.weight": "model.embed_tokens.weight"}
    found = hugging_face_tensors(open_checkpoint(folder), known)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    with pytest.raises(
        CheckpointError, match=r"jaxgen\.json is damaged: it lacks `nothing`\. Convert the original again"
    ):
        hugging_face_tensors(open_checkpoint(folder), known | {"copies": {"lm_head.weight": "nothing"}})


def test_without_a_size_the_files_are_those_of_the_source(source: Source, native: Source) -> None:
    files, text = hugging_face_files(native, read_manifest(native.folder), None)
    assert text == (source.folder / "model.safetensors.index.json").read_text()
    assert [file.name for file in files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file in files:
        content = (source.folder / file.name).read_bytes()
        assert (len(content), content[: len(file.header)]) == (file.nbytes, file.header)
        for piece, entry in zip(file.pieces, entries(file).values(), strict=True):
            assert piece.offset == len(file.header) + entry["data_offsets"][0]


def test_of_another_size_they_are_named_as_transformers_names_them(native: Source) -> None:
    known = read_manifest(native.folder)
    (single,), text = hugging_face_files(native, known, 10**9)
    assert (single.name, text) == ("model.safetensors", None)
    assert metadata(single) == {"format": "pt"} and {*entries(single)} == {*random_tensors()}
    files, text = hugging_face_files(native, known, 12_000)
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert text is not None and json.loads(text)["weight_map"] == {n: f.name for f in files for n in entries(f)}


def test_without_an_account_of_the_source_there_is_one_file_of_up_to_five_gigabytes(native: Source) -> None:
    known = {key: value for key, value in read_manifest(native.folder).items() if key != "source"}
    (single,), text = hugging_face_files(native, known, None)
    assert (single.name, text) == ("model.safetensors", None)


def changed_header(origin: dict[str, Any], old: str, new: str) -> None:
    name = next(name for name, text in origin["headers"].items() if old in text)
    origin["headers"][name] = origin["headers"][name].replace(old, new, 1)


def without_a_file(origin: dict[str, Any]) -> None:
    name, _ = origin["headers"].popitem()
    content = json.loads(origin["index"])
    owners = {tensor: owner for tensor, owner in content["weight_map"].items() if owner != name}
    origin["index"] = json.dumps(content | {"weight_map": owners})


DAMAGED: dict[str, Any] = {
    "a file outside": lambda o: o["headers"].update({"../x.safetensors": "{}"}),
    "a file of another kind": lambda o: o["headers"].update({"x.bin": "{}"}),
    "a file too few": lambda o: o["headers"].popitem(),
    "a file too few that the index lacks too": without_a_file,
    "a tensor twice": lambda o: o["headers"].update({"x.safetensors": next(iter(o["headers"].values()))}),
    "no index of two files": lambda o: o.update(index=None),
    "an index of other files": lambda o: o.update(index=o["index"].replace("00001-of", "00002-of", 1)),
    "an index of nothing": lambda o: o.update(index="{}"),
    "a header of nothing": lambda o: changed_header(o, o["headers"]["model-00001-of-00002.safetensors"], "{}"),
    "another name": lambda o: changed_header(o, "embed_tokens", "embed_token"),
    "another shape": lambda o: changed_header(o, "[48, 32]", "[32, 48]"),
    "another dtype": lambda o: changed_header(o, '"F32"', '"I32"'),
    "no JSON": lambda o: changed_header(o, "{", "["),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_an_account_of_other_files_than_there_were_is_refused(how: str, native: Source) -> None:
    known = json.loads(json.dumps(read_manifest(native.folder)))
    DAMAGED[how](known["source"])
    with pytest.raises(CheckpointError, match=r"jaxgen\.json (is damaged: .* Convert the original again|names)"):
        hugging_face_files(native, known, None)
    assert hugging_face_files(native, known, 10**9)[0]  # which reads none of it

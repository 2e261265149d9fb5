"""A converted folder holds the bits of its source, says where each came from, and appears whole or not at all."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    Tensors,
    assert_same_bits,
    peak_growth,
    random_tensors,
    write_checkpoint,
    write_large_checkpoint,
)

import jaxgen
from jaxgen import CheckpointError, cli, convert

ROOT = Path(__file__).parents[1]
F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16
TIED = CONFIG | {"tie_word_embeddings": True}


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def assert_converts(source: Path, destination: Path, dtype: str | None = None) -> None:
    """The converted folder loads to the same model as its source."""
    converted = jaxgen.load(convert.convert_checkpoint(source, destination), dtype)
    original = jaxgen.load(source, dtype)
    assert_same_bits(converted, original)
    assert converted.config == original.config
    assert converted.generation_config.to_dict() == original.generation_config.to_dict()


@pytest.mark.parametrize(
    ("config", "head"),
    [
        pytest.param(CONFIG | {"num_key_value_heads": 4}, "own", id="MHA"),
        pytest.param(CONFIG, "own", id="GQA"),
        pytest.param(CONFIG | {"num_key_value_heads": 1, "head_dim": 12}, "own", id="MQA"),
        pytest.param(CONFIG | {"attention_bias": True, "mlp_bias": True}, "own", id="biases"),
        pytest.param(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "own", id="rope"),
        pytest.param(CONFIG, "missing", id="missing head"),
        pytest.param(TIED, "missing", id="tied"),
        pytest.param(TIED, "equal", id="tied with an equal head"),
    ],
)
def test_a_converted_folder_loads_to_the_same_model(config: dict[str, Any], head: str, tmp_path: Path) -> None:
    tensors = random_tensors(config)
    if head == "missing":
        tensors.pop("lm_head.weight", None)
    if head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert_converts(write_checkpoint(tmp_path / "source", config, tensors), tmp_path / "converted")


def random_bits(dtype: Any) -> Tensors:
    """Tensors of every bit pattern: NaN payloads, infinities, subnormals and negative zeros."""
    rng = np.random.default_rng(0)
    return {
        name: np.frombuffer(rng.bytes(tensor.size * np.dtype(dtype).itemsize), dtype).reshape(tensor.shape)
        for name, tensor in random_tensors().items()
    }


@pytest.mark.parametrize(("dtype", "name"), [(F32, "F32"), (F16, "F16"), (BF16, "BF16")])
def test_every_parameter_keeps_its_bits_and_its_dtype(dtype: Any, name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors=random_bits(dtype))
    assert_converts(source, tmp_path / "converted")
    pieces = jaxgen.checkpoint.open_folder(tmp_path / "converted").pieces
    assert {tensor.dtype for parts in pieces.values() for tensor in parts} == {name}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_mixed_dtypes_lose_nothing(dtype: str | None, tmp_path: Path) -> None:
    tensors = random_tensors()
    cycle = [BF16, F16, F32, F16, BF16]
    mixed = {name: tensor.astype(cycle[i % len(cycle)]) for i, (name, tensor) in enumerate(tensors.items())}
    assert_converts(write_checkpoint(tmp_path / "source", tensors=mixed), tmp_path / "converted", dtype)


def test_parameters_are_spread_over_shards_of_bounded_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 12_000
    monkeypatch.setattr(convert, "_SHARD_BYTES", limit)
    assert_converts(source, tmp_path / "converted")
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "converted").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in random_tensors().values())
    header = 2000
    assert all(file.stat().st_size < limit + header for file in files)


def test_all_files_but_the_weights_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps(CONFIG, indent=7, sort_keys=True) + "\n\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text('{ "transformers_version":  "4.41.0" }\r\n')
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    (source / "chat_template.jinja").write_bytes("{{ 'ä' }}\r\n".encode())
    kept = {name: value for name, value in hashes(source).items() if not name.startswith("model")}
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "stray.safetensors"):
        (source / name).write_bytes(b"weights")
    converted = hashes(convert.convert_checkpoint(source, tmp_path / "converted"))
    added = {"jaxgen.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert converted.keys() == kept.keys() | added
    assert kept.items() <= converted.items()


def test_chat_templates_in_a_folder_of_their_own_are_copied(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ messages }}")
    converted = convert.convert_checkpoint(source, tmp_path / "converted")
    assert (converted / "additional_chat_templates" / "rag.jinja").read_bytes() == b"{{ messages }}"


def test_links_to_files_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_converts(snapshot, tmp_path / "converted")
    assert not any(file.is_symlink() for file in (tmp_path / "converted").iterdir())


def test_the_manifest_names_every_tensor_of_the_source_once_and_every_parameter(source: Path, tmp_path: Path) -> None:
    converted = convert.convert_checkpoint(source, tmp_path / "converted")
    manifest = json.loads((converted / "jaxgen.json").read_text())
    parameters = manifest.pop("parameters")
    assert manifest == {"format": 1, "jaxgen": jaxgen.__version__}
    assert Counter(name for names in parameters.values() for name in names) == Counter(list(random_tensors()))
    leaves = jax.tree_util.tree_leaves_with_path(jaxgen.load(source))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    assert sorted(parameters) == sorted(paths)
    prefix = "model.layers.1.self_attn."
    expected = [f"{prefix}{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
    assert parameters["layers.1.self_attn.qkv_proj.weight"] == expected


@pytest.mark.parametrize("occupied_by", ["a full folder", "an empty folder", "a file", "the source itself"])
def test_a_destination_that_exists_is_refused_and_left_alone(occupied_by: str, source: Path, tmp_path: Path) -> None:
    destination = source if occupied_by == "the source itself" else tmp_path / "converted"
    if occupied_by == "a file":
        destination.write_text("mine")
    elif occupied_by != "the source itself":
        destination.mkdir()
    if occupied_by == "a full folder":
        (destination / "file").write_text("mine")
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError, match=f"{destination} exists already"):
        convert.convert_checkpoint(source, destination)
    assert hashes(tmp_path) == before


def test_a_converted_folder_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    converted = convert.convert_checkpoint(source, tmp_path / "converted")
    with pytest.raises(CheckpointError, match=f"{converted} is converted already"):
        convert.convert_checkpoint(converted, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("place", ["converted", "new/folders/converted", "source/converted"])
def test_the_source_is_left_as_it_was(place: str, source: Path, tmp_path: Path) -> None:
    before = hashes(source)
    convert.convert_checkpoint(source, tmp_path / place)
    assert {name: value for name, value in hashes(source).items() if not name.startswith("converted/")} == before


@pytest.mark.parametrize("broken", ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_broken_source_leaves_nothing_behind(broken: str, source: Path, tmp_path: Path) -> None:
    (source / broken).write_bytes((source / broken).read_bytes()[:-1])
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError, match=broken):
        convert.convert_checkpoint(source, tmp_path / "converted")
    assert hashes(tmp_path) == before
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()], ids=type)
def test_a_conversion_that_fails_on_the_way_leaves_nothing_behind(
    failure: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: Path, *arguments: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise failure
        original(path, *arguments)

    original = convert.write
    monkeypatch.setattr(convert, "write", write)
    monkeypatch.setattr(convert, "_SHARD_BYTES", 12_000)
    before = hashes(tmp_path)
    with pytest.raises(type(failure)):
        convert.convert_checkpoint(source, tmp_path / "converted")
    assert len(written) == 3
    assert hashes(tmp_path) == before
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        (None, "lacks `model.embed_tokens.weight`"),
        ("", "jaxgen.json cannot be read"),
        ("{}", "format None"),
        ('{"format": 2}', "format 2, and this jaxgen reads 1"),
    ],
)
def test_a_converted_folder_without_the_manifest_of_this_version_is_refused(
    manifest: str | None, named: str, source: Path, tmp_path: Path
) -> None:
    file = convert.convert_checkpoint(source, tmp_path / "converted") / "jaxgen.json"
    file.unlink()
    if manifest is not None:
        file.write_text(manifest)
    with pytest.raises(CheckpointError, match=named):
        jaxgen.load(tmp_path / "converted")


def test_saving_into_a_converted_folder_is_refused_since_its_weights_would_win(source: Path, tmp_path: Path) -> None:
    converted = convert.convert_checkpoint(source, tmp_path / "converted")
    model = jaxgen.load(source)
    with pytest.raises(ValueError, match=r"another layout.*jaxgen\.json.*Choose an empty folder"):
        jaxgen.save(model, converted)


def run_module(*arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_module_converts_and_says_where_the_result_is(source: Path, tmp_path: Path) -> None:
    ended = run_module(source, tmp_path / "converted")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert f"wrote {tmp_path / 'converted'}" in ended.stderr
    assert_same_bits(jaxgen.load(tmp_path / "converted"), jaxgen.load(source))


def test_the_module_fails_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    ended = run_module(tmp_path, tmp_path / "converted")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"python -m convert: {tmp_path / 'config.json'} is missing")
    assert ended.stderr.count("\n") == 1


def test_the_command_of_the_package_converts_as_well(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(source), str(tmp_path / "converted")]
    assert cli.main(arguments) == 0
    assert f"wrote {tmp_path / 'converted'}" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    assert f"jaxgen convert: {tmp_path / 'converted'} exists already" in capsys.readouterr().err


def test_converting_holds_little_more_than_one_parameter(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small"), tmp_path / "small converted"
    large, largest_tensor = write_large_checkpoint(tmp_path / "large")
    growth = peak_growth("convert", small, (large, tmp_path / "large converted"))
    assert growth < 1.5 * largest_tensor + 64 * 2**20

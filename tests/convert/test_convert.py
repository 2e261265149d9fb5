"""A converted folder holds the bits of its source, says where each came from, and gives them all back."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    Tensors,
    assert_same_bits,
    hashes,
    peak_growth,
    random_tensors,
    write_checkpoint,
    write_json,
    write_large_checkpoint,
)
from encoder_decoders import encoder_decoder
from layouts import BF16, F16, F32, LAYOUTS, TIED, mixed, random_bits
from safetensors.numpy import load_file

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.cli.main import main

OTHER_WEIGHTS = ("consolidated.safetensors", "pytorch_model.bin", "model-00009-of-00009.safetensors")
# NaN equals nothing; transformers wants metadata in an index, and believes a single file before it.
UNLIKE_TRANSFORMERS = {name for name in LAYOUTS if "bits" in name} | {"bare index", "other weights beside"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def converted(source: Path, name: str = "converted", **options: Any) -> Path:
    return convert.convert_checkpoint(source, source.parent / name, **options).folder


def assert_converts(source: Path, destination: Path, dtype: str | None = None) -> None:
    """The converted folder loads to the same model as its source."""
    found = jaxgen.load(convert.convert_checkpoint(source, destination).folder, dtype)
    original = jaxgen.load(source, dtype)
    assert_same_bits(found, original)
    assert found.config == original.config
    assert found.generation_config.to_dict() == original.generation_config.to_dict()


# There and back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_way_back_restores_every_file_to_the_byte(layout: str, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path / "source")
    assert_converts(source, tmp_path / "converted")
    before = hashes(source)
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back")
    unread = {*OTHER_WEIGHTS, *(["model.safetensors"] if layout == "other weights beside" else [])}
    assert hashes(tmp_path / "back") == {name: value for name, value in before.items() if name not in unread}
    assert hashes(source) == before


@pytest.mark.oracle
@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - UNLIKE_TRANSFORMERS))
def test_transformers_computes_the_same_from_the_way_back(layout: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = LAYOUTS[layout](tmp_path / "source")
    convert.convert_checkpoint(source, tmp_path / "converted")
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back", shard_size="20KB")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits
            for folder in (source, tmp_path / "back")
        )
    assert torch.equal(first, second)


def test_there_are_thirty_layouts() -> None:
    assert len(LAYOUTS) >= 30


@pytest.mark.parametrize(("dtype", "name"), [(F32, "float32"), (F16, "float16"), (BF16, "bfloat16")])
def test_every_parameter_keeps_its_bits_and_its_dtype(dtype: Any, name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors=random_bits(dtype))
    pieces = jaxgen.checkpoint.source.open_checkpoint(converted(source)).pieces
    assert {str(tensor.dtype) for parts in pieces.values() for tensor in parts} == {name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mixed_dtypes_load_to_the_same_values(dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors=mixed([BF16, F16, F32, F16, BF16]))
    assert_converts(source, tmp_path / "converted", dtype)


def test_a_missing_head_is_missing_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", CONFIG, random_tensors(TIED))
    assert_converts(source, tmp_path / "converted")
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_more_rows_than_the_config_says_are_kept_with_a_warning(tmp_path: Path) -> None:
    wide = random_tensors(CONFIG | {"vocab_size": 64})
    source = write_checkpoint(tmp_path / "source", tensors=wide)
    report = convert.convert_checkpoint(source, tmp_path / "converted")
    assert any("64 rows, but config.json says `vocab_size`=48" in message for message in report.warnings)
    with pytest.warns(UserWarning, match="64 rows"):
        assert jaxgen.load(report.folder).vocab_size == 64
    convert.convert_to_hugging_face(report.folder, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


# Options


def test_weights_in_another_dtype_say_so_in_their_config(source: Path, tmp_path: Path) -> None:
    target = converted(source, dtype="bfloat16")
    model = jaxgen.load(target)
    assert model.dtype == BF16
    assert_same_bits(model, jaxgen.load(source, "bfloat16"))
    assert json.loads((target / "config.json").read_text()) == CONFIG | {"dtype": "bfloat16"}
    convert.convert_to_hugging_face(target, tmp_path / "back")
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]
    assert_same_bits(jaxgen.load(tmp_path / "back"), model)


@pytest.mark.parametrize(("size", "limit"), [(12_000, 12_000), ("12KB", 12_000), ("8KiB", 8192), (1, 6200)])
def test_parameters_are_spread_over_files_of_bounded_size(size: Any, limit: int, source: Path) -> None:
    target = converted(source, shard_size=size)
    assert_same_bits(jaxgen.load(target), jaxgen.load(source))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in random_tensors().values())
    header = 2200
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(jaxgen.load(source)))
    assert all(file.stat().st_size < max(limit, largest) + header for file in files)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shard_size": "big"}, "`shard_size`='big'.*5GB"),
        ({"shard_size": 0}, "`shard_size`=0"),
        ({"shard_size": "5 PB"}, "`shard_size`='5 PB'"),
        ({"workers": 0}, "`workers`=0"),
        ({"dtype": "int8"}, "`dtype`='int8'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], named: str, source: Path) -> None:
    with pytest.raises(ValueError, match=named):
        converted(source, **options)
    assert list(source.parent.iterdir()) == [source]


def test_the_number_of_workers_changes_nothing(source: Path) -> None:
    assert hashes(converted(source, "one", workers=1)) == hashes(converted(source, "five", workers=5))


# What is written


def test_all_files_but_the_weights_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = LAYOUTS["tokenizer and templates"](tmp_path / "source")
    (source / "config.json").write_text(json.dumps(CONFIG, indent=7, sort_keys=True) + "\n\n")
    kept = {name: value for name, value in hashes(source).items() if name != "model.safetensors"}
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "stray.safetensors"):
        (source / name).write_bytes(b"weights")
    found = hashes(converted(source))
    added = {"jaxgen.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert found.keys() == kept.keys() | added
    assert kept.items() <= found.items()


def test_links_are_followed_within_the_folder_and_nowhere_else(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "vocabulary.json").symlink_to("tokenizer.json")
    target = converted(source)
    assert not (target / "vocabulary.json").is_symlink()
    (tmp_path / "secret").write_text("mine")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link out of its folder"):
        converted(source, "again")


@pytest.mark.filterwarnings("ignore:.*is read from pickles")
@pytest.mark.usefixtures("processes_with_torch")
@pytest.mark.parametrize("pickled", [False, True])
def test_links_that_lead_elsewhere_are_followed_on_request(pickled: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rag.jinja").write_text("{{ messages }}")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in [*source.iterdir(), tmp_path / "tokenizer.json"]:
        (linked / file.name).symlink_to(file)
    (linked / "additional_chat_templates").symlink_to(tmp_path / "templates")
    if pickled:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.tensor(array) for name, array in random_tensors().items()}
        torch.save(tensors, tmp_path / "weights.bin")
        for file in linked.glob("*.safetensors*"):
            file.unlink()
        (linked / "pytorch_model.bin").symlink_to(tmp_path / "weights.bin")
    target = tmp_path / "target"
    arguments = ["convert", str(linked), str(target), *(["--allow-pickle"] if pickled else [])]
    assert main(arguments) == 1 and not target.exists()
    assert main([*arguments, "--follow-links"]) == 0
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    assert_same_bits(jaxgen.load(target), jaxgen.load(source))
    assert main(["verify", str(target)]) == 0
    assert main(["inspect", str(linked), "--follow-links"]) == (1 if pickled else 0)


def test_the_manifest_names_every_tensor_of_the_source_once_and_every_parameter(source: Path) -> None:
    manifest = json.loads((converted(source) / "jaxgen.json").read_text())
    parameters, sha256 = manifest["parameters"], manifest["sha256"]
    assert (manifest["format"], manifest["jaxgen"], manifest["copies"]) == (2, jaxgen.__version__, {})
    tensors = random_tensors()
    assert Counter(name for names in parameters.values() for name in names) == Counter(list(tensors))
    assert sha256["tensors"] == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
    assert sha256["files"] == {"config.json": hashlib.sha256((source / "config.json").read_bytes()).hexdigest()}
    leaves = jax.tree_util.tree_leaves_with_path(jaxgen.load(source))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    assert sorted(parameters) == sorted(paths)
    prefix = "model.layers.1.self_attn."
    expected = [f"{prefix}{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
    assert parameters["layers.1.self_attn.qkv_proj.weight"] == expected


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        (None, "lacks `model.layers.0.self_attn.q_proj.weight`"),
        ("", "jaxgen.json cannot be read"),
        ("{}", "format None"),
        ('{"format": 1}', "format 1, but this jaxgen reads 2"),
    ],
)
def test_a_converted_folder_without_the_manifest_of_this_version_is_refused(
    manifest: str | None, named: str, source: Path
) -> None:
    target = converted(source)
    (target / "jaxgen.json").unlink()
    if manifest is not None:
        (target / "jaxgen.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=named):
        jaxgen.load(target)


def test_saving_into_a_converted_folder_is_refused_since_its_weights_would_win(source: Path) -> None:
    with pytest.raises(ValueError, match=r"another layout.*jaxgen\.json.*Choose an empty folder"):
        jaxgen.save(jaxgen.load(source), converted(source))


# Verifying


def test_a_sound_checkpoint_of_either_kind_is_verified(source: Path) -> None:
    size = sum(tensor.nbytes for tensor in random_tensors().values())
    for folder in (source, converted(source)):
        report = convert.verify(folder)
        assert (report.folder, report.tensors, report.bytes) == (folder, len(random_tensors()), size)
        assert report.warnings == ()


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "config.json", "tokenizer.json"])
def test_a_single_changed_bit_is_found(file: str, source: Path) -> None:
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    target = converted(source)
    content = bytearray((target / file).read_bytes())
    content[-3] ^= 1
    (target / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has changed since it was written|cannot be read"):
        convert.verify(target)


def test_the_way_back_refuses_tensors_that_changed(source: Path, tmp_path: Path) -> None:
    target = converted(source)
    file = target / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        convert.convert_to_hugging_face(target, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("key", ["copies", "sha256", "source"])
@pytest.mark.parametrize("value", [None, [], {"a": 1}, "text", {"headers": {"../x": "{}"}, "index": None}])
def test_a_manifest_that_was_tampered_with_is_refused(key: str, value: Any, source: Path, tmp_path: Path) -> None:
    target = converted(source)
    manifest = json.loads((target / "jaxgen.json").read_text())
    write_json(target / "jaxgen.json", manifest | {key: value})
    if (key, value) == ("source", None) or (key, value) == ("source", []):
        return  # as if the weights had been changed: they are written in files of their own
    with pytest.raises(CheckpointError, match=r"jaxgen\.json"):
        convert.convert_to_hugging_face(target, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_not_copied_is_said(source: Path) -> None:
    (source / "training_args.bin").write_bytes(b"x")
    (source / "runs").mkdir()
    for odd in ("config.json:Zone.Identifier", "a b\t.txt", "ä.md", os.fsdecode(b"\xff.txt")):
        (source / odd).write_text(odd, errors="surrogateescape")
    report = convert.convert_checkpoint(source, source.parent / "converted")
    (warning,) = report.warnings
    assert "`runs`, `training_args.bin` are not part of the model and were skipped" in warning
    assert convert.verify(report.folder).warnings == ()
    convert.convert_to_hugging_face(report.folder, source.parent / "back")
    kept = {name: value for name, value in hashes(source).items() if name != "training_args.bin"}
    assert hashes(source.parent / "back") == kept


def test_files_that_lead_elsewhere_are_refused_before_the_first_byte(source: Path) -> None:
    (source / "additional_chat_templates").symlink_to("/etc")
    (source / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link out of its folder"):
        converted(source)
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('\\"F32\\"', '\\"BF16\\"'),
        ('\\"shape\\"', '\\"shapes\\"'),
        ("[0, ", "[1, "),
        ("model-00002-of-00002", "model-00003-of-00002"),
        ('model-00002-of-00002.safetensors\\"', 'config.json\\"'),
        ('"copies": {}', '"copies": {"lm_head.weight": "nothing"}'),
    ],
)
def test_a_damaged_account_of_the_original_files_is_noticed(old: str, new: str, source: Path) -> None:
    target = converted(source)
    text = (target / "jaxgen.json").read_text()
    assert old in text
    (target / "jaxgen.json").write_text(text.replace(old, new, 1))
    for function in (convert.verify, lambda folder: convert.convert_to_hugging_face(folder, source.parent / "back")):
        with pytest.raises(CheckpointError, match=r"jaxgen\.json is damaged"):
            function(target)


def test_the_way_back_refuses_a_config_that_changed(source: Path) -> None:
    target = converted(source)
    write_json(target / "config.json", CONFIG | {"rope_theta": 5.0})
    with pytest.raises(CheckpointError, match=r"has changed since it was written: `config\.json`"):
        convert.convert_to_hugging_face(target, source.parent / "back")
    assert sorted(source.parent.iterdir()) == [target, source]


LARGE = CONFIG | {"vocab_size": 9000, "hidden_size": 64}


def test_what_is_larger_than_a_block_is_converted_to_the_byte_and_back(tmp_path: Path) -> None:
    """Tensors, and files that hold none, as a tokenizer of a hundred thousand entries."""
    source = write_checkpoint(tmp_path / "source", LARGE, random_tensors(LARGE))
    (source / "tokenizer.json").write_text(json.dumps([*range(400_000)]))
    target = converted(source)
    assert hashes(target)["tokenizer.json"] == hashes(source)["tokenizer.json"]
    assert_same_bits(jaxgen.load(target), jaxgen.load(source))
    convert.convert_to_hugging_face(target, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)
    convert.verify(target)
    for name in ("tokenizer.json", "model-00001-of-00001.safetensors"):
        content = (target / name).read_bytes()
        (target / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="has changed since it was written"):
            convert.verify(target)
        (target / name).write_bytes(content)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_value_of_a_large_tensor_is_looked_at(dtype: Any, tmp_path: Path) -> None:
    tensors = random_tensors(LARGE, dtype)
    tensors["model.embed_tokens.weight"] = np.zeros((9000, 64), dtype)
    tensors["model.embed_tokens.weight"][4000, 5] = 1  # in the middle of a block, and the other at the end of the last
    tensors["lm_head.weight"][-1, -1] = np.inf
    source = write_checkpoint(tmp_path / "source", LARGE, tensors)
    (said,) = convert.convert_checkpoint(source, tmp_path / "converted").warnings
    assert "NaN or infinity in `lm_head.weight`." in said


def test_float16_that_overflows_is_said_to(tmp_path: Path) -> None:
    large = {name: array * 1e7 for name, array in random_tensors().items()}
    source = write_checkpoint(tmp_path / "source", tensors=large)
    report = convert.convert_checkpoint(source, tmp_path / "converted", dtype="float16")
    assert any("NaN or infinity in" in each and "largest float16 is 65504" in each for each in report.warnings)


def test_nan_infinity_and_zeros_are_reported(tmp_path: Path) -> None:
    tensors = {name: array.copy() for name, array in random_tensors().items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = -np.inf
    tensors["model.norm.weight"][:] = -0.0
    source = write_checkpoint(tmp_path / "source", tensors=tensors)
    for report in (convert.convert_checkpoint(source, tmp_path / "converted"), convert.verify(source)):
        broken, zero = report.warnings
        assert (
            "NaN or infinity in `model.layers.0.mlp.up_proj.weight`, `model.layers.1.mlp.down_proj.weight`." in broken
        )
        assert "nothing but zeros in `model.norm.weight`." in zero


# Refusals


def test_a_converted_folder_is_not_converted_again_nor_a_source_turned_back(source: Path, tmp_path: Path) -> None:
    target = converted(source)
    with pytest.raises(CheckpointError, match=f"{target} is already converted"):
        converted(target, "again")
    with pytest.raises(CheckpointError, match=f"{source} is already a Hugging Face folder"):
        convert.convert_to_hugging_face(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("broken", ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_broken_source_leaves_nothing_behind(broken: str, source: Path, tmp_path: Path) -> None:
    (source / broken).write_bytes((source / broken).read_bytes()[:-1])
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError, match=broken):
        converted(source)
    assert hashes(tmp_path) == before
    assert list(tmp_path.iterdir()) == [source]


# The command


def run_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxgen", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_converts_and_says_what_it_did(source: Path, tmp_path: Path) -> None:
    ended = run_command(source, tmp_path / "converted", "--workers", 2, "--shard-size", "20KB")
    assert (ended.returncode, ended.stdout) == (0, "")
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'converted'}: {len(random_tensors())} tensors, 0.1 MB in ")
    assert second == f"load it with jaxgen.load('{tmp_path / 'converted'}')"
    assert_same_bits(jaxgen.load(tmp_path / "converted"), jaxgen.load(source))


def test_the_command_fails_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = run_command(tmp_path / "empty", tmp_path / "converted")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"jaxgen: {tmp_path / 'empty' / 'config.json'} is missing")
    assert ended.stderr.count("\n") == 1


def test_the_commands_of_the_package_convert_verify_and_turn_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, back = str(tmp_path / "converted"), str(tmp_path / "back")
    assert main(["convert", str(source), target]) == 0
    assert f"wrote {target}" in capsys.readouterr().err
    assert main(["convert", str(source), target]) == 1
    assert f"jaxgen: {target} exists already and is not empty" in capsys.readouterr().err
    assert main(["verify", target]) == 0
    assert f"verified {target}" in capsys.readouterr().err
    assert main(["convert", "--to-hf", target, back]) == 0
    assert hashes(tmp_path / "back") == hashes(source)
    (tmp_path / "back" / "config.json").write_text("{")
    assert main(["verify", back]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"jaxgen: {back}/config.json cannot be read")
    assert main(["convert", "--to-hf", "--dtype", "float32", target, back]) == 1
    assert capsys.readouterr().err == "jaxgen: --dtype cannot be combined with --to-hf\n"


def test_an_interrupted_command_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    program = (
        "import signal, sys; from jaxgen.cli.main import main\n"
        "from jaxgen.checkpoint.safetensors_file import StoredTensor\n"
        "StoredTensor.read = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a process in the background is without
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "convert", str(source), str(tmp_path / "converted")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT
    assert "jaxgen: not complete. The same command with --resume" in ended.stderr and "Traceback" not in ended.stderr


# The hub


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../model", "owner/"])
def test_what_is_neither_a_path_nor_a_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither an existing path nor the name of a model"):
        convert.convert_checkpoint(name, tmp_path / "converted")


def test_a_hub_that_does_not_answer_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/model is neither an existing path nor in the cache"):
        convert.convert_checkpoint("owner/model", tmp_path / "converted")  # the tests are offline


# Memory


def test_converting_takes_the_memory_of_a_fraction_of_a_tensor(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small"), tmp_path / "small converted"
    large, largest_tensor = write_large_checkpoint(tmp_path / "large")
    growth = peak_growth("convert", small, (large, tmp_path / "large converted"))
    assert growth < largest_tensor
    shutil.rmtree(large)


# Encoder-decoder models


def as_an_old_t5(tensors: Tensors) -> Tensors:
    """With the embedding once more for each stack, and a table of distances that no cross-attention has."""
    copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), tensors["shared.weight"])
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return tensors | copies | {stray: np.ones((8, 4), F32)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 9])  # a T5, a BART and an M2M100
def test_an_encoder_decoder_model_is_converted_and_its_way_back_is_the_original_to_the_byte(
    seed: int, shards: int, tmp_path: Path
) -> None:
    one_file = encoder_decoder(seed).write(tmp_path / "one file")
    tensors = load_file(one_file / "model.safetensors")
    tensors = as_an_old_t5(tensors) if seed == 0 else tensors
    source = write_checkpoint(tmp_path / "source", encoder_decoder(seed).config, tensors, shards=shards)
    assert_same_bits(jaxgen.load(source), jaxgen.load(one_file))
    assert_converts(source, tmp_path / "converted")
    convert.verify(tmp_path / "converted")
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)

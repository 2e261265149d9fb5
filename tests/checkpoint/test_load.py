"""What a folder may hold and what is made of it; what is missing, broken or unknown is refused before it is read."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from architectures import ARCHITECTURES, Architecture
from checkpoints import (
    CONFIG,
    Tensors,
    assert_same_bits,
    peak_growth,
    random_tensors,
    write_checkpoint,
    write_json,
    write_large_checkpoint,
    write_safetensors,
)
from flax import nnx
from oracle import torch_logits, torch_model

import jaxgen
from jaxgen import CheckpointError
from jaxgen.checkpoint.safetensors_file import StoredTensor
from jaxgen.planning.plan import plan

INDEX = "model.safetensors.index.json"
TENSORS = random_tensors()
TIED = CONFIG | {"tie_word_embeddings": True}
NORM = "model.norm.weight"

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def assert_holds(model: Any, tensors: Tensors, dtype: Any) -> None:
    """The model holds these Hugging Face tensors in a dtype, and nothing else."""
    expected: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        *blocks, layer, kind = name.removeprefix("model.").split(".")
        expected.setdefault(".".join([*blocks, FUSED.get(layer, layer), kind, "value"]), []).append(tensor)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, np.concatenate(expected.pop(name)).astype(dtype), err_msg=name)
    assert not expected


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_file_and_shards_with_an_index_load_to_the_same_model(shards: int, tmp_path: Path) -> None:
    assert_holds(jaxgen.load(write_checkpoint(tmp_path, shards=shards)), TENSORS, np.float32)


@pytest.mark.oracle
def test_shards_that_transformers_saved_are_loaded(tmp_path: Path) -> None:
    theirs = torch_model(write_checkpoint(tmp_path / "one"))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_holds(jaxgen.load(tmp_path / "shards"), TENSORS, np.float32)


@pytest.mark.parametrize("content", [b"no safetensors", None], ids=["broken", "whole"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_stray_file_beside_the_weights_is_never_read(content: bytes | None, shards: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=shards)
    strays = ["consolidated.safetensors", "model-00009-of-00009.safetensors", "pytorch_model.bin"]
    for name in [*strays, *(["model.safetensors"] if shards > 1 else [])]:
        write_safetensors(folder / name, random_tensors(seed=1))
        if content is not None:
            (folder / name).write_bytes(content)
    assert_holds(jaxgen.load(folder), TENSORS, np.float32)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_key_value_heads": None},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
)
def test_every_layout_of_tensors_is_loaded(flags: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG | flags
    assert_holds(jaxgen.load(write_checkpoint(tmp_path, config)), random_tensors(config), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_buffers_that_the_config_determines_are_compared_with_it(dtype: Any, tmp_path: Path) -> None:
    frequencies = (1 / 10000 ** (np.arange(0, 8, 2) / 8)).astype(dtype)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    buffers = {"rope.freqs": frequencies, name: frequencies, "model.layers.0.attn.masked_bias": np.array(-1e4, dtype)}
    folder = write_checkpoint(tmp_path / "right", tensors=TENSORS | buffers)
    assert_holds(jaxgen.load(folder), TENSORS, np.float32)
    for wrong in (frequencies * 1.1, frequencies[1:], frequencies.astype(np.int32)):
        folder = write_checkpoint(tmp_path / "wrong", tensors=TENSORS | buffers | {name: wrong})
        with pytest.warns(UserWarning, match=f"`{name}` differs from the values that config.json implies"):
            assert_holds(jaxgen.load(folder), TENSORS, np.float32)


@pytest.mark.parametrize("flag", [True, False])
def test_a_missing_head_is_that_of_the_embedding(flag: bool, tmp_path: Path) -> None:
    headless = random_tensors(TIED)
    model = jaxgen.load(write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": flag}, headless))
    assert_holds(model, headless, np.float32)
    assert model.config.tie_word_embeddings


def test_a_head_beside_a_tied_flag_must_equal_the_embedding(tmp_path: Path) -> None:
    headless = random_tensors(TIED)
    equal = headless | {"lm_head.weight": headless["model.embed_tokens.weight"]}
    assert_holds(jaxgen.load(write_checkpoint(tmp_path / "equal", TIED, equal)), headless, np.float32)
    for name, head in {
        "other": equal["lm_head.weight"] + 1,
        "wider": equal["lm_head.weight"].astype(np.float64).astype(np.float16),
        "shorter": equal["lm_head.weight"][1:],
    }.items():
        folder = write_checkpoint(tmp_path / name, TIED, equal | {"lm_head.weight": head})
        with pytest.raises(CheckpointError, match=r"`tie_word_embeddings`.*`lm_head.weight` differs"):
            jaxgen.load(folder)


def test_a_head_that_differs_in_its_last_value_only_is_another_head(tmp_path: Path) -> None:
    config = TIED | {"vocab_size": 9000, "hidden_size": 64}
    tensors = random_tensors(config)
    head = tensors["model.embed_tokens.weight"].copy()
    folder = write_checkpoint(tmp_path / "equal", config, tensors | {"lm_head.weight": head})
    assert_holds(jaxgen.load(folder), tensors, np.float32)
    head[-1, -1] += 1
    folder = write_checkpoint(tmp_path / "other", config, tensors | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` differs"):
        jaxgen.load(folder)


# Dtypes


@each_dtype
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_held_in_the_dtype_that_is_asked_for(dtype: str, source: Any, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=source)
    folder = write_checkpoint(tmp_path, CONFIG | {"dtype": "float32"}, tensors)
    for asked in (dtype, jnp.dtype(dtype), getattr(jnp, dtype)):
        model = jaxgen.load(folder, asked)
        assert model.dtype == dtype
    assert_holds(model, tensors, dtype)


@each_dtype
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_config_by_default(key: str, dtype: str, tmp_path: Path) -> None:
    assert_holds(jaxgen.load(write_checkpoint(tmp_path, CONFIG | {key: dtype})), TENSORS, dtype)


@each_dtype
def test_the_dtype_is_that_of_the_embedding_where_the_config_says_nothing(dtype: str, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    for other in (np.float32, np.float16):
        tensors = random_tensors(dtype=other) | {name: TENSORS[name].astype(dtype)}
        assert_holds(jaxgen.load(write_checkpoint(tmp_path, tensors=tensors)), tensors, dtype)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "half precision"])
def test_other_dtypes_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`dtype`='{dtype}'.*bfloat16"):
        jaxgen.load(write_checkpoint(tmp_path), dtype)
    with pytest.raises(ValueError, match=f"`dtype`='{dtype}'.*bfloat16"):
        jaxgen.from_config(CONFIG, dtype=dtype)
    if dtype != "float64":
        with pytest.raises(CheckpointError, match=f"`dtype`='{dtype}'.*bfloat16"):
            jaxgen.load(write_checkpoint(tmp_path, CONFIG | {"dtype": dtype}))


@pytest.mark.parametrize("named", [{}, {"torch_dtype": "float64"}], ids=str)
def test_float64_is_held_as_float32_with_a_warning_or_as_what_is_asked_for(named: Any, tmp_path: Path) -> None:
    wide = random_tensors(dtype=np.float64)
    folder = write_checkpoint(tmp_path, CONFIG | named, wide)
    with pytest.warns(UserWarning, match="its weights are float64. They are held as float32"):
        assert_holds(jaxgen.load(folder), wide, np.float32)
    with pytest.warns(UserWarning, match="float64"):
        assert_holds(jaxgen.load(folder, "bfloat16"), wide, "bfloat16")


def test_float64_that_the_config_wants_in_another_dtype_is_cast_without_a_word(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG | {"dtype": "float16"}, random_tensors(dtype=np.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(jaxgen.load(folder), random_tensors(dtype=np.float64), np.float16)


# Names


BASE_NAMES = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
RENAMED: dict[str, tuple[dict[str, Any], Tensors]] = {
    "the base model's": ({}, BASE_NAMES),
    "the base model's, and its class": ({"architectures": ["LlamaModel"]}, BASE_NAMES),
    "the base model's, tied": (
        {"architectures": ["LlamaModel"], "tie_word_embeddings": True},
        {name: tensor for name, tensor in BASE_NAMES.items() if name != "lm_head.weight"},
    ),
    "some of the base model's": (
        {},
        {name if ".1." in name else name.removeprefix("model."): tensor for name, tensor in TENSORS.items()},
    ),
    "all below a model": ({}, {f"model.{name}": tensor for name, tensor in TENSORS.items()}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("names", RENAMED)
def test_names_that_transformers_finds_a_place_for_are_found_here(names: str, tmp_path: Path) -> None:
    changes, tensors = RENAMED[names]
    model = jaxgen.load(write_checkpoint(tmp_path, CONFIG | changes, tensors))
    assert_holds(model, random_tensors(TIED) if "tie_word_embeddings" in changes else TENSORS, np.float32)
    ids = np.array([[5, 6, 7]])
    np.testing.assert_allclose(model(jnp.asarray(ids)), torch_logits(torch_model(tmp_path), ids), atol=1e-4)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    for number, name in enumerate((NORM.removeprefix("model."), f"model.{NORM}")):
        refused(
            write_checkpoint(tmp_path / str(number), tensors=TENSORS | {name: np.ones(32, np.float32)}), f"`{name}`"
        )
    twice = {f"model.{NORM}": TENSORS[NORM], NORM.removeprefix("model."): TENSORS[NORM]}
    others = {name: tensor for name, tensor in TENSORS.items() if name != NORM}
    refused(write_checkpoint(tmp_path / "twice", tensors=others | twice), "`norm.weight`")


def test_a_base_model_that_is_not_tied_has_no_head_to_be_guessed(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    headless = {name: tensor for name, tensor in BASE_NAMES.items() if name != "lm_head.weight"}
    refused(write_checkpoint(tmp_path, CONFIG | {"architectures": ["LlamaModel"]}, headless), "without a head.*LlamaMo")


# Generation config


def test_the_generation_config_is_read(tmp_path: Path) -> None:
    fields = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    folder = write_checkpoint(tmp_path, CONFIG | {"temperature": 0.9, "top_p": 0.5}, generation_config=fields)
    found = jaxgen.load(folder).generation_config.to_dict()
    assert {key: found[key] for key in (*fields, "top_p")} == fields | {"top_p": None}


def test_generation_fields_of_an_old_config_become_the_generation_config(tmp_path: Path) -> None:
    fields = {"temperature": 0.6, "do_sample": True, "max_length": 33, "eos_token_id": [2, 7], "pad_token_id": 0}
    found = jaxgen.load(write_checkpoint(tmp_path, CONFIG | fields)).generation_config.to_dict()
    assert {key: found[key] for key in fields} == fields


# Refusals


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Checks that a folder is refused in one line that names it, before the first value is read."""
    read: list[str] = []
    monkeypatch.setattr(StoredTensor, "read", lambda self, out, start: read.append(self.name))

    def check(folder: Path, named: str) -> None:
        with pytest.raises(CheckpointError, match=named) as refusal:
            jaxgen.load(folder)
        assert str(folder) in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert not read

    return check


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        (NORM, None, f"lacks `{NORM}`"),
        ("model.embed_tokens.weight", None, "lacks `model.embed_tokens.weight`"),
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks `model\.layers\.1\.mlp\.up_proj\.weight`"),
        ("model.layers.2.input_layernorm.weight", np.ones(32, np.float32), "`model.layers.2.input_layernorm.weight`"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32), "`model.layers.0.self_attn.q_proj.bias`"),
        (NORM, np.ones(31, np.float32), rf"`{NORM}` has shape \(31,\).*\(32,\)"),
        (NORM, np.ones((32, 1), np.float32), rf"`{NORM}` has shape \(32, 1\)"),
        (NORM, np.array(1, np.float32), rf"`{NORM}` has shape \(\)"),
        ("lm_head.weight", np.ones((49, 32), np.float32), r"`lm_head.weight` has shape \(49, 32\).*\(48, 32\)"),
        (NORM, np.ones(32, ml_dtypes.float8_e4m3fn), "8-bit floats.*`quantization_config`"),
        (NORM, np.ones(32, np.int32), "int32.*BF16"),
    ],
)
def test_tensors_that_do_not_make_the_model_are_refused_by_name(
    name: str, tensor: np.ndarray | None, named: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    others = {key: value for key, value in TENSORS.items() if key != name}
    refused(write_checkpoint(tmp_path, tensors=others | ({} if tensor is None else {name: tensor})), named)


def test_many_missing_tensors_are_counted(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    refused(write_checkpoint(tmp_path, CONFIG | {"num_hidden_layers": 3}, TENSORS), "lacks `.*`, `.*` and 4 more")


def test_a_config_of_more_than_8_megabytes_is_refused_unread(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG) + " " * (8 << 20))
    refused(folder, "the limit is 8388608")


def test_more_layers_than_any_model_has_are_refused_before_they_are_listed(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    many = TENSORS | {f"more.{number}": np.ones(1, np.float32) for number in range(300)}
    refused(write_checkpoint(tmp_path, CONFIG | {"num_hidden_layers": 300}, many), "the limit is 256 layers")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "mixtral", "`model_type`='mixtral'.*llama"),
        ("model_type", None, "`model_type`=None"),
        ("model_type", ["llama"], "`model_type`"),
        ("sliding_window", 4096, "`sliding_window`=4096"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("rope_scaling", {"type": "magic"}, "magic"),
    ],
)
def test_a_config_of_another_model_is_refused(
    key: str, value: Any, named: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    refused(write_checkpoint(tmp_path, CONFIG | {key: value}), named)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": "\xff"}', b"<html>", b'{"a":' * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_json_object_is_refused_by_name(
    file: str, content: bytes, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path, shards=2, generation_config={})
    (folder / file).write_bytes(content)
    refused(folder, file)


@pytest.mark.parametrize("weight_map", [None, [], {NORM: 1}, {}])
def test_an_index_that_lists_no_files_is_refused(
    weight_map: Any, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    write_json(folder / INDEX, {"weight_map": weight_map})
    refused(folder, "weight_map|holds 0 tensors")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], dict[str, str]]) -> None:
    write_json(folder / INDEX, {"weight_map": edit(json.loads((folder / INDEX).read_text())["weight_map"])})


def test_a_tensor_of_the_index_that_is_in_no_shard_is_refused(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    edit_index(folder, lambda index: index | {"model.extra.weight": index[NORM]})
    refused(folder, "disagree about `model.extra.weight`")


def test_a_tensor_of_a_shard_that_is_not_in_the_index_is_refused(
    tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    edit_index(folder, lambda index: {name: file for name, file in index.items() if name != NORM})
    refused(folder, f"disagree about `{NORM}`")


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>" * 9])
def test_a_shard_that_is_missing_or_broken_is_refused_by_name(
    content: bytes | None, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    if content is not None:
        shard.write_bytes(content)
    refused(folder, shard.name)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "{above}/outside.safetensors",
        "inner/../../outside.safetensors",
        "inner\\inside.safetensors",
        "C:\\inside.safetensors",
        "C:inside.safetensors",
        "",
        ".",
        "..",
        "inside\0.safetensors",
        "inside" * 99,
    ],
)
def test_an_index_names_nothing_but_files_in_its_folder(
    name: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    name, shard = name.format(above=tmp_path), folder / "model-00002-of-00002.safetensors"
    (folder / "inner").mkdir()
    for place in (
        "../outside.safetensors",
        "inner/inside.safetensors",
        "inside.safetensors",
        "inner\\inside.safetensors",
    ):
        shutil.copy(shard, folder / place)
    edit_index(folder, lambda index: {key: name if file == shard.name else file for key, file in index.items()})
    refused(folder, INDEX)


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "adapter_model.safetensors"]
)
def test_weights_in_another_format_are_refused_by_name(
    file: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, f"neither .* nor model.safetensors.*{file}")


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, f"neither {INDEX} nor model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json is missing")


def test_what_is_no_folder_is_refused(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    folder = write_checkpoint(tmp_path)
    for path in (folder / "model.safetensors", folder / "nothing", Path("organisation/model")):
        refused(path, "is not a folder.*nothing is downloaded")


# Folders of another kind: what is wrong, and a way that works


def moved(**names: str) -> Callable[[Path], None]:
    """Files of a checkpoint in other places: config, weights."""

    def move(folder: Path) -> None:
        for file, new in {"config.json": names.get("config"), "model.safetensors": names.get("weights")}.items():
            if new is not None:
                (folder / new).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).rename(folder / new)

    return move


ELSEWHERE: dict[str, tuple[Callable[[Path], None], str]] = {
    "Meta": (moved(config="params.json", weights="consolidated.00.pth"), "Meta .*--allow-pickle"),
    "Mistral": (
        moved(config="params.json", weights="consolidated.safetensors"),
        r"Mistral's own format \(params.json, consolidated.safetensors\).*Download config.json and model\*",
    ),
    "half of Mistral": (
        moved(weights="consolidated.safetensors"),
        "but consolidated.safetensors, .*Mistral's own format",
    ),
    "GGUF": (
        moved(config="README.md", weights="model-Q4.gguf"),
        r"holds model-Q4\.gguf, .*Pass the file: .*/model-Q4\.gguf",
    ),
    "GGUF with a config": (moved(weights="model-Q4.gguf"), r"but model-Q4\.gguf, .*Pass the file: .*/model-Q4\.gguf"),
    "a folder within": (
        moved(config="last/config.json", weights="last/model.safetensors"),
        r"but `.*/last` has one\. Pass",
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_folder_of_another_kind_is_refused_with_a_way_that_works(
    kind: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    break_it, named = ELSEWHERE[kind]
    folder = write_checkpoint(tmp_path / "model")
    break_it(folder)
    refused(folder, named)


def test_shards_without_their_index_ask_for_it(
    tmp_path: Path, refused: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    refused(folder, rf"'model-00001-of-00002\.safetensors', .*parts of a model\. Download {INDEX} too")
    (folder / INDEX).write_bytes(index)
    monkeypatch.undo()
    assert_holds(jaxgen.load(folder), TENSORS, np.float32)


def test_the_top_of_the_hubs_cache_names_the_snapshot(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    top = tmp_path / "models--owner--name"
    snapshots = [write_checkpoint(top / "snapshots" / commit) for commit in ("0abc", "1def")]
    refused(top, rf"`{snapshots[0]}`, `{snapshots[1]}` has")
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("1def")
    refused(top, rf"`{snapshots[1]}`, `{snapshots[0]}` has")
    refused(top / "snapshots", f"`{snapshots[0]}`")


@pytest.mark.parametrize(
    ("prefix", "library"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("base_model.", "peft"),
        ("model._orig_mod.", "torch.compile"),
    ],
)
def test_names_that_a_library_has_wrapped_are_refused_by_its_name(
    prefix: str, library: str, tmp_path: Path, refused: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, tensors={prefix + name: tensor for name, tensor in TENSORS.items()})
    part = prefix.removeprefix("model.")
    refused(folder, f"`{prefix}lm_head.weight`, where `{part}` comes from {library}")
    monkeypatch.undo()
    inner = prefix.removesuffix(part)
    write_checkpoint(tmp_path, tensors={inner + name: tensor for name, tensor in TENSORS.items()})
    assert_holds(jaxgen.load(folder), TENSORS, np.float32)


def test_a_model_of_remote_code_is_told_that_none_is_run(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    folder = write_checkpoint(tmp_path, CONFIG | {"model_type": "chatglm", "auto_map": auto_map})
    refused(folder, r"`model_type`='chatglm'.*`auto_map`\) is never run")


# Links


def linked(folder: Path, real: Path) -> Path:
    """A folder of links to the files of another one."""
    folder.mkdir()
    for file in real.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def cache_with_blobs_elsewhere(path: Path) -> Path:
    """The hub's cache, whose `blobs` are on another disk."""
    write_checkpoint(path / "disk", shards=2)
    snapshot = path / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").symlink_to(path / "disk")
    for file in (path / "disk").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


@pytest.mark.parametrize("kind", ["files", "blobs"])
def test_links_out_of_the_folder_are_followed_on_request(
    kind: str, tmp_path: Path, refused: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_checkpoint(tmp_path / "real", shards=2)
    folder = linked(tmp_path / "linked", real) if kind == "files" else cache_with_blobs_elsewhere(tmp_path)
    refused(folder, r"is a link out of its folder, to .*`follow_links=True` \(--follow-links\)")
    monkeypatch.undo()
    assert_holds(jaxgen.load(folder, follow_links=True), TENSORS, np.float32)
    assert plan(folder, follow_links=True).parameters == sum(tensor.size for tensor in TENSORS.values())


# Saving

some_architectures = pytest.mark.parametrize(
    "architecture", [pytest.param(architecture, id=architecture.name) for architecture in ARCHITECTURES[:11:2]]
)


@some_architectures
@each_dtype
def test_a_saved_model_is_loaded_bit_for_bit(architecture: Architecture, dtype: str, tmp_path: Path) -> None:
    model = jaxgen.load(architecture.write(tmp_path / "source"), dtype)
    jaxgen.save(model, tmp_path / "new" / "saved")
    again = jaxgen.load(tmp_path / "new" / "saved")
    assert_same_bits(again, model)
    assert again.config == model.config
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.oracle
@some_architectures
def test_transformers_computes_the_same_from_a_saved_model(architecture: Architecture, tmp_path: Path) -> None:
    model = jaxgen.load(architecture.write(tmp_path / "source"))
    jaxgen.save(model, tmp_path / "saved")
    ids, mask = architecture.prompts()
    theirs = torch_logits(torch_model(tmp_path / "saved"), ids, mask)
    difference = np.asarray(jax.jit(type(model).__call__)(model, ids, mask)) - theirs
    assert np.abs(difference[mask.astype(bool)]).max() < 1e-4


@pytest.mark.parametrize("generation_config", [{"temperature": 0.6, "top_p": 0.9}, {"max_length": 4096}])
def test_a_generation_config_that_transformers_would_not_save_is_saved(
    generation_config: dict[str, Any], tmp_path: Path
) -> None:
    model = jaxgen.load(write_checkpoint(tmp_path / "source", generation_config=generation_config))
    jaxgen.save(model, tmp_path / "saved")
    found = jaxgen.load(tmp_path / "saved").generation_config.to_dict()
    assert {key: found[key] for key in generation_config} == generation_config


def test_a_folder_holds_what_was_saved_last(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "saved")
    model = jaxgen.load(write_checkpoint(tmp_path / "other", tensors=random_tensors(seed=1)))
    jaxgen.save(model, folder)
    assert_same_bits(jaxgen.load(folder), model)


def test_saving_beside_shards_is_refused_since_their_index_would_win(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "saved", shards=2)
    with pytest.raises(ValueError, match=r"another layout.*model\.safetensors\.index\.json.*Choose an empty folder"):
        jaxgen.save(jaxgen.load(folder), folder)


def test_a_model_with_an_adapter_is_not_saved_before_it_is_merged(tmp_path: Path) -> None:
    model = jaxgen.from_config(CONFIG)
    attention = model.layers[0].self_attn
    lora = attention.o_proj = nnx.LoRA(32, 4, 32, base_module=attention.o_proj, rngs=nnx.Rngs(0))
    lora.lora_b[...] = jax.random.normal(jax.random.key(0), (4, 32))
    ids = jnp.array([[5, 6, 7]])
    adapted = model(ids)
    with pytest.raises(ValueError, match=r"`layers\.0\.self_attn\.o_proj\.lora_a`.*`nnx.LoRA`.*base module back"):
        jaxgen.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    lora.base_module.weight[...] += (lora.lora_a[...] @ lora.lora_b[...]).T
    attention.o_proj = lora.base_module
    jaxgen.save(model, tmp_path / "saved")
    np.testing.assert_allclose(jaxgen.load(tmp_path / "saved")(ids), adapted, atol=1e-5)


# Random models


def test_random_weights_are_normal_with_the_spread_of_the_config_and_follow_from_the_key() -> None:
    config = CONFIG | {"initializer_range": 0.5, "vocab_size": 1000, "num_hidden_layers": 1}
    model = jaxgen.from_config(config, 3, "bfloat16")
    assert model.dtype == jnp.bfloat16
    embedding, head = (np.asarray(layer.weight[...], np.float32) for layer in (model.embed_tokens, model.lm_head))
    assert embedding.std() == pytest.approx(0.5, rel=0.02)
    assert abs(np.corrcoef(embedding.ravel(), head.ravel())[0, 1]) < 0.03
    assert np.all(np.asarray(model.norm.weight[...]) == 1)
    assert_same_bits(jaxgen.from_config(config, jax.random.key(3), "bfloat16"), model)


def test_a_random_model_its_saved_copy_and_one_with_another_generation_config_share_their_programs(
    tmp_path: Path,
) -> None:
    model = jaxgen.from_config(CONFIG)
    jaxgen.save(model, tmp_path)
    loaded = jaxgen.load(tmp_path)
    assert_same_bits(loaded, model)
    loaded.generation_config = type(model.generation_config)(temperature=0.5)
    assert loaded.generation_config.temperature == 0.5
    assert jax.tree.structure(loaded) == jax.tree.structure(model)


# Memory


def test_loading_holds_the_model_and_little_more(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small")
    large, largest_tensor = write_large_checkpoint(tmp_path / "large")
    size = (large / "model.safetensors").stat().st_size
    assert size > 190e6
    assert peak_growth("load", (small,), (large,)) < size + 1.5 * largest_tensor + 64 * 2**20

"""An adapter is added to its base model as peft adds it, or refused before anything is written."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG as MODEL_CONFIG
from checkpoints import Tensors, random_tensors, write_checkpoint, write_json, write_safetensors
from jaxgen.convert.lora import MergedTensor
from oracle import torch_model
from safetensors.numpy import load_file

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.safetensors_file import read_header

RANK, ALPHA = 4, 6
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "rank_pattern": {},
    "init_lora_weights": True,
}
TARGETS = [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def adapter(dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(7)
    tensors = {}
    for target in TARGETS:
        rows, columns = random_tensors()[f"{target}.weight"].shape
        for part, shape in {"A": (RANK, columns), "B": (rows, RANK)}.items():
            values = rng.standard_normal(shape, np.float32).astype(dtype)
            tensors[f"base_model.model.{target}.lora_{part}.weight"] = values
    return tensors


def write_adapter(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir()
    write_json(folder / "adapter_config.json", CONFIG | changes)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_added_in_float32_and_rounded_once(dtype: Any, rslora: bool, tmp_path: Path) -> None:
    tensors, delta = random_tensors(dtype=dtype), adapter(dtype)
    base = write_checkpoint(tmp_path / "base", tensors=tensors)
    folder = write_adapter(tmp_path / "adapter", delta, use_rslora=rslora)
    expected = dict(tensors)
    for target in TARGETS:
        down, up = (delta[f"base_model.model.{target}.lora_{part}.weight"].astype(np.float32) for part in "AB")
        scaling = ALPHA / (math.sqrt(RANK) if rslora else RANK)
        whole = tensors[f"{target}.weight"].astype(np.float32) + scaling * (up @ down)
        expected[f"{target}.weight"] = whole.astype(dtype)
    convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=folder)
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back")
    plain = jaxgen.load(write_checkpoint(tmp_path / "expected", tensors=expected))
    for name in ("converted", "back"):
        merged = jaxgen.load(tmp_path / name)
        for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(plain), strict=True):
            assert one.dtype == other.dtype == dtype
            # Products of float32 round in the order that BLAS takes, which depends on the number of rows.
            np.testing.assert_allclose(
                np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=float(ml_dtypes.finfo(dtype).eps) * 4
            )


def test_a_weight_larger_than_a_block_gets_the_product_of_its_own_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"weight": (5000, 80), "up": (5000, RANK), "down": (RANK, 80)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    stored = read_header(tmp_path, "x.safetensors")
    merged = MergedTensor("weight", np.dtype(np.float32), (5000, 80), **stored, scaling=1.5)
    blocks = [block.copy() for block in merged.blocks()]
    assert len(blocks) > 1
    expected = arrays["weight"] + 1.5 * (arrays["up"] @ arrays["down"])
    np.testing.assert_allclose(np.concatenate(blocks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`, but does not hold its tensors"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"bias": "all"}, "`bias`='all'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"r": "four"}, "`r`='four'"),
        ({"r": 0}, "`r`=0"),
        ({"r": 8}, "do not fit"),
        ({"lora_alpha": None}, "`lora_alpha`=None"),
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    base, folder = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "adapter", adapter(), **changes)
    with pytest.raises(CheckpointError, match=named):
        convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=folder)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", np.ones((RANK, 32), np.float32)),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight", np.ones((16, RANK), np.float32)),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", None),
        ("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((RANK, 48), np.float32)),
        ("base_model.model.score.weight", np.ones((2, 32), np.float32)),
        ("base_model.model.model.norm.weight", np.ones(31, np.float32)),
        ("base_model.model.lm_head.weight", np.ones((52, 32), np.float32)),
        ("base_model.model.lm_head.weight", np.ones((48, 31), np.float32)),
        ("base_model.model.model.norm.weight", np.ones(32, np.int32)),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", np.ones(32, np.float32)),
    ],
)
def test_parts_of_an_adapter_without_a_place_are_refused(name: str, array: np.ndarray | None, tmp_path: Path) -> None:
    changed = {key: value for key, value in (adapter() | {name: array}).items() if value is not None}
    base, folder = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "adapter", changed)
    with pytest.raises(CheckpointError, match=str(folder)):
        convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=folder)


def test_an_adapter_in_place_of_a_model_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", adapter())
    for function in (jaxgen.load, lambda folder: convert.convert_checkpoint(folder, tmp_path / "converted")):
        with pytest.raises(CheckpointError, match=f"LoRA adapter.*--merge-lora {folder}"):
            function(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"does not hold adapter_config\.json"):
        convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=base)
    assert json.loads((base / "config.json").read_text())


# Embeddings, heads and what an adapter brings whole. The names are those that peft 0.21 writes.

PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALING = ALPHA / RANK


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def base_layer(name: str, values: np.ndarray) -> Tensors:
    return {f"{PREFIX}{name.removesuffix('.weight')}.base_layer.weight": values}


HEAD_FACTORS = {f"{PREFIX}lm_head.lora_A.weight": drawn(RANK, 32), f"{PREFIX}lm_head.lora_B.weight": drawn(48, RANK)}
EMBEDDING_FACTORS = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": drawn(RANK, 48),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": drawn(32, RANK),
}
HEAD_DELTA = SCALING * HEAD_FACTORS[f"{PREFIX}lm_head.lora_B.weight"] @ HEAD_FACTORS[f"{PREFIX}lm_head.lora_A.weight"]
EMBEDDING_DELTA = SCALING * (drawn(32, RANK) @ drawn(RANK, 48)).T
BASE = random_tensors()
BROUGHT: dict[str, tuple[Tensors, Tensors]] = {
    "a head": (HEAD_FACTORS | base_layer(HEAD, BASE[HEAD]), {HEAD: BASE[HEAD] + HEAD_DELTA}),
    "a head without its base": (HEAD_FACTORS, {HEAD: BASE[HEAD] + HEAD_DELTA}),
    "a head on another base": (HEAD_FACTORS | base_layer(HEAD, drawn(48, 32)), {HEAD: drawn(48, 32) + HEAD_DELTA}),
    "an embedding": (
        EMBEDDING_FACTORS | base_layer(EMBEDDING, BASE[EMBEDDING]),
        {EMBEDDING: BASE[EMBEDDING] + EMBEDDING_DELTA},
    ),
    "a head and a norm that were trained whole": (
        {PREFIX + HEAD: drawn(48, 32), f"{PREFIX}model.norm.weight": drawn(32)},
        {HEAD: drawn(48, 32), "model.norm.weight": drawn(32)},
    ),
    "more tokens": (
        {PREFIX + HEAD: drawn(52, 32), PREFIX + EMBEDDING: drawn(52, 32) + 1},
        {HEAD: drawn(52, 32), EMBEDDING: drawn(52, 32) + 1},
    ),
}


def merged_weights(base: Path, folder: Path, target: Path) -> Tensors:
    """The tensors of the Hugging Face folder that a merge comes to."""
    convert.convert_checkpoint(base, target / "converted", merge_lora=folder)
    convert.convert_to_hugging_face(target / "converted", target / "back")
    jaxgen.load(target / "converted")
    return load_file(target / "back" / "model.safetensors")


@pytest.mark.parametrize("what", BROUGHT)
@pytest.mark.filterwarnings("error")
def test_what_an_adapter_brings_besides_the_layers_is_merged(what: str, tmp_path: Path) -> None:
    brought, expected = BROUGHT[what]
    base = write_checkpoint(tmp_path / "base", tensors=BASE)
    folder = write_adapter(tmp_path / "adapter", adapter() | brought)
    found = merged_weights(base, folder, tmp_path)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6)
    assert found["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    vocabulary = json.loads((tmp_path / "converted" / "config.json").read_text())["vocab_size"]
    assert vocabulary == len(expected.get(HEAD, BASE[HEAD]))


def test_an_adapter_of_nothing_but_whole_weights_does_not_pass_for_the_original(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tensors=BASE)
    folder = write_adapter(tmp_path / "adapter", {PREFIX + HEAD: drawn(48, 32)}, modules_to_save=["lm_head"])
    np.testing.assert_array_equal(merged_weights(base, folder, tmp_path)[HEAD], drawn(48, 32))
    convert.verify(tmp_path / "converted")


TIED = {
    "a head": (HEAD_FACTORS, r"`lm_head\.lora_A\.weight`.*tie_word_embeddings.*head of its own"),
    "an embedding": (EMBEDDING_FACTORS, r"`model\.embed_tokens\.lora_embedding_A`"),
    "an embedding that was trained whole": ({PREFIX + EMBEDDING: drawn(48, 32)}, r"`model\.embed_tokens\.weight`"),
    "both, and they differ": (
        {PREFIX + EMBEDDING: drawn(48, 32), PREFIX + HEAD: drawn(48, 32) + 1},
        "`lm_head.weight`",
    ),
}


@pytest.mark.parametrize("what", TIED)
def test_what_a_tied_model_cannot_hold_apart_is_refused_with_the_way_out(what: str, tmp_path: Path) -> None:
    brought, named = TIED[what]
    config = MODEL_CONFIG | {"tie_word_embeddings": True}
    base, folder = write_checkpoint(tmp_path / "base", config), write_adapter(tmp_path / "adapter", adapter() | brought)
    with pytest.raises(CheckpointError, match=named):
        convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=folder)


def test_a_tied_model_gets_more_tokens_from_an_adapter_whose_head_is_its_embedding(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", MODEL_CONFIG | {"tie_word_embeddings": True})
    brought = {PREFIX + name: drawn(52, 32) for name in (HEAD, EMBEDDING)}
    found = merged_weights(base, write_adapter(tmp_path / "adapter", adapter() | brought), tmp_path)
    np.testing.assert_array_equal(found[EMBEDDING], drawn(52, 32))
    assert HEAD not in found


PEFT_CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    {"target_modules": ["down_proj"], "use_rslora": True},
]


@pytest.mark.oracle
@pytest.mark.parametrize("options", PEFT_CASES, ids=str)
def test_the_merge_is_that_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    base = write_checkpoint(tmp_path / "base", tensors=BASE)
    model = peft.get_peft_model(
        torch_model(base), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, **options)
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "adapter").merge_and_unload()
    found = merged_weights(base, tmp_path / "adapter", tmp_path)
    expected = theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)

"""An adapter is added to its base model as peft adds it, or refused before anything is written."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensors, random_tensors, write_checkpoint, write_json, write_safetensors
from jaxgen.convert.lora import MergedTensor

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.safetensors_file import read_header

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
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
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
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        convert.convert_checkpoint(base, tmp_path / "converted", merge_lora=base)
    assert json.loads((base / "config.json").read_text())

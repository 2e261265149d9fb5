"""8-bit floats are multiplied out, each scheme of scales as it is meant; everything else is refused by its name."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, Tensors, assert_same_bits, random_tensors, write_checkpoint

import jaxgen
from jaxgen import CheckpointError, convert

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
WIDE = CONFIG | {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48, "vocab_size": 64, "dtype": "bfloat16"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": strategy, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


SCHEMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a scale per tensor": (FP8, "weight_scale", "tensor"),
    "a scale per tensor, of compressed-tensors": (compressed("tensor"), "weight_scale", "one"),
    "a scale per channel": ({"quant_method": "fbgemm_fp8"}, "weight_scale", "channel"),
    "a scale per channel, of compressed-tensors": (compressed("channel"), "weight_scale", "channel"),
    "a scale per channel, flat": (FP8, "weight_scale", "flat"),
    "a scale per block": (FP8 | {"weight_block_size": [128, 128]}, "weight_scale_inv", "block"),
    "a scale per block, of compressed-tensors": (
        compressed("block", block_structure=[128, 128]),
        "weight_scale",
        "block",
    ),
}


def quantised(scheme: str, config: dict[str, Any] = WIDE) -> tuple[dict[str, Any], Tensors, Tensors]:
    """The config and tensors of a quantised checkpoint, and what they amount to."""
    quantization, suffix, kind = SCHEMES[scheme]
    rng = np.random.default_rng(0)
    tensors, amount = {}, {}
    for name, tensor in random_tensors(config, np.float32).items():
        amount[name] = tensors[name] = tensor.astype(BF16)
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            shape = {
                "tensor": (),
                "one": (1,),
                "channel": (rows, 1),
                "flat": (rows,),
                "block": (-(-rows // 128), -(-columns // 128)),
            }[kind]
            scale = rng.uniform(0.5, 2, shape).astype(np.float32)
            tensors[name] = (tensor * 100).astype(F8)
            tensors[name.removesuffix("weight") + suffix] = scale
            spread = scale if kind != "flat" else scale[:, None]
            if kind == "block":
                spread = np.kron(scale, np.ones((128, 128), np.float32))[:rows, :columns]
            amount[name] = (tensors[name].astype(np.float32) * spread).astype(BF16)
    tensors["model.layers.0.self_attn.q_proj.input_scale"] = np.ones(1, np.float32)
    return config | {"quantization_config": quantization}, tensors, amount


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_multiplied_out(scheme: str, tmp_path: Path) -> None:
    config, tensors, amount = quantised(scheme)
    folder = write_checkpoint(tmp_path / "source", config, tensors, shards=2)
    plain = jaxgen.load(write_checkpoint(tmp_path / "plain", WIDE, amount))
    report = convert.convert_checkpoint(folder, tmp_path / "converted")
    convert.convert_to_hugging_face(report.folder, tmp_path / "back")
    for model in (jaxgen.load(folder), jaxgen.load(report.folder), jaxgen.load(tmp_path / "back")):
        assert model.dtype == BF16
        assert_same_bits(model, plain)
    assert b"quantization_config" not in (tmp_path / "back" / "config.json").read_bytes()


@pytest.mark.parametrize("scheme", ["a scale per channel", "a scale per block"])
def test_weights_larger_than_a_block_have_the_scales_of_their_own_rows(scheme: str, tmp_path: Path) -> None:
    """They are read and multiplied out a part at a time."""
    large = WIDE | {"hidden_size": 256, "intermediate_size": 4300, "head_dim": 64, "num_hidden_layers": 1}
    config, tensors, amount = quantised(scheme, large)
    folder = write_checkpoint(tmp_path / "source", config, tensors)
    plain = jaxgen.load(write_checkpoint(tmp_path / "plain", large, amount))
    report = convert.convert_checkpoint(folder, tmp_path / "converted")
    for model in (jaxgen.load(folder), jaxgen.load(report.folder)):
        assert_same_bits(model, plain)


def test_another_dtype_is_rounded_to_once(tmp_path: Path) -> None:
    config, tensors, _ = quantised("a scale per channel")
    folder = write_checkpoint(tmp_path / "source", config, tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    exact = tensors[name].astype(np.float32) * tensors[f"{name}_scale"]
    convert.convert_checkpoint(folder, tmp_path / "converted", dtype="float32")
    for model in (jaxgen.load(folder, "float32"), jaxgen.load(tmp_path / "converted")):
        np.testing.assert_array_equal(model.layers[0].mlp.down_proj.weight[...], exact)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {"weights": None}}},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "mxfp4"},
        {"bits": 4},
        {"quant_method": ["fp8"]},
    ],
    ids=str,
)
def test_other_schemes_are_refused_by_name(quantization: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG | {"quantization_config": quantization})
    for function in (jaxgen.load, lambda folder: convert.convert_checkpoint(folder, tmp_path / "converted")):
        with pytest.raises(CheckpointError, match=r"quantised .*unquantised original") as refusal:
            function(folder)
        assert str(quantization.get("quant_method")) in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_quantization_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`quantization_config`='int4'"):
        jaxgen.load(write_checkpoint(tmp_path, CONFIG | {"quantization_config": "int4"}))


@pytest.mark.parametrize(
    ("mark", "named"),
    [("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("weight_packed", "compressed-tensors")],
)
def test_quantised_tensors_are_recognised_without_a_word_in_the_config(mark: str, named: str, tmp_path: Path) -> None:
    odd = {f"model.layers.0.mlp.up_proj.{mark}": np.ones(4, np.int32)}
    with pytest.raises(CheckpointError, match=f"look quantised by {named}"):
        jaxgen.load(write_checkpoint(tmp_path, tensors=random_tensors() | odd))


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{NAME}_scale": None}, f"`{NAME}` is an 8-bit float without a scale"),
        ({f"{NAME}_scale": np.ones((3, 1), np.float32)}, rf"`{NAME}`.*scale of float32 \(3, 1\)"),
        ({f"{NAME}_scale": np.ones(1, np.int32)}, rf"`{NAME}`.*scale of int32 \(1,\)"),
        ({"model.norm.weight_scale": np.ones(1, np.float32)}, r"`model.norm.weight` has a scale, but is not an 8-bit"),
        ({"model.norm.weight": np.ones(192, F8), "model.norm.weight_scale": np.ones(1, np.float32)}, "model.norm"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    config, tensors, _ = quantised("a scale per channel")
    changed = {name: array for name, array in (tensors | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=named):
        jaxgen.load(write_checkpoint(tmp_path, config, changed))


def test_8_bit_floats_without_a_config_that_explains_them_are_refused(tmp_path: Path) -> None:
    _, tensors, _ = quantised("a scale per tensor")
    with pytest.raises(CheckpointError, match=r"8-bit floats, but config\.json has no `quantization_config`"):
        jaxgen.load(write_checkpoint(tmp_path, WIDE, tensors))

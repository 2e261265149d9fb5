"""Quantised checkpoints: 8-bit floats are multiplied out as they are read, anything else is refused by its name.

Three layouts are known: one scale per tensor, one per output channel, one per block of 128 by 128. A scale multiplies:
what `weight_scale_inv` holds is the inverse of what the weights were multiplied with (transformers 5.24
`Fp8Dequantize`, compressed-tensors "float-quantized").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.safetensors_file import DTYPES, FLOAT8, ComputedTensor, Tensor

KEYS = ("quantization_config", "compression_config")  # of config.json

_SCALES = ("weight_scale", "weight_scale_inv")
# Of activations and of the KV cache, which are held in the model's own dtype here.
_UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub")
# What is left of weights in other schemes, for checkpoints whose config does not name one.
_MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
}
_HOW_TO_GO_ON = "Convert the unquantised original instead."


@dataclass(frozen=True)
class ScaledTensor(ComputedTensor):
    """An 8-bit weight [out, in] times its scale, rounded to the dtype that the checkpoint's weights have otherwise.

    Attributes:
        scale: [], [1] or [1, 1] for all; [out] or [out, 1] for each row; [out / 128, in / 128] for blocks.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    weight: Tensor
    scale: Tensor
    block: int | None

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        scale = np.empty((self.scale.rows, *self.scale.shape[1:]), np.float32)
        self.scale.read_into(scale)
        done = 0
        for rows in self.weight.blocks(start, start + len(out)):
            wide = rows.astype(np.float32)
            if self.block:
                numbers = np.arange(start + done, start + done + len(rows)) // self.block
                wide *= np.repeat(scale[numbers], self.block, axis=1)[:, : wide.shape[1]]
            elif scale.size == 1:
                wide *= scale.reshape(())
            else:
                wide *= scale.reshape(-1, 1)[start + done : start + done + len(rows)]
            out[done : done + len(rows)] = wide
            done += len(rows)


def dequantised(tensors: Mapping[str, Tensor], raw: Mapping[str, Any], embedding: np.dtype | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint without scales.

    Args:
        raw: its config.json.
        embedding: the dtype of the token embedding, if there is one.

    Raises:
        CheckpointError: if the checkpoint is quantised in another way, or a weight and its scale do not fit.
    """
    quantization = next((raw[key] for key in KEYS if raw.get(key)), None)
    marks = {mark for mark in _MARKS for name in tensors if name.endswith(mark)}
    if marks and not quantization:
        schemes = sorted({_MARKS[mark] for mark in marks})
        raise CheckpointError(f"its tensors look quantised by {' or '.join(schemes)}. {_HOW_TO_GO_ON}")
    if quantization:
        block = _block_size(quantization)
    elif any(tensor.dtype in FLOAT8.values() for tensor in tensors.values()):
        raise CheckpointError(
            "its tensors are 8-bit floats, but config.json has no `quantization_config` that says how they are scaled. "
            + _HOW_TO_GO_ON
        )
    else:
        return dict(tensors)
    dtype = wide_dtype(raw, embedding)
    scales = {name[: name.rindex("_scale")]: tensor for name, tensor in tensors.items() if name.endswith(_SCALES)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8.values():
            if name not in scales:
                raise CheckpointError(f"`{name}` is an 8-bit float without a scale. {_HOW_TO_GO_ON}")
            scale = scales.pop(name)
            _check_scale(tensor, scale, block)
            found[name] = ScaledTensor(name, dtype, tensor.shape, tensor, scale, block)
        elif not name.endswith((*_SCALES, *_UNUSED)):
            found[name] = tensor
    if all(found.get(name) is tensor for name, tensor in tensors.items()):
        raise CheckpointError(
            f"config.json has `{KEYS[0]}`={quantization!r}, but no tensor is an 8-bit float. Remove it if "
            "they are the unquantised weights."
        )
    if scales:
        raise CheckpointError(f"`{min(scales)}` has a scale, but is no 8-bit float. {_HOW_TO_GO_ON}")
    return found


def _block_size(quantization: Any) -> int | None:
    """The rows and columns of a block, or None for scales of tensors or channels."""
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"`quantization_config`={quantization!r} in config.json is no object. {_HOW_TO_GO_ON}")
    method = quantization.get("quant_method")
    blocks = quantization.get("weight_block_size")
    if method in ("fp8", "fbgemm_fp8") and blocks in (None, [128, 128]):
        return 128 if blocks else None
    if method == "compressed-tensors" and quantization.get("format") in ("float-quantized", "naive-quantized"):
        groups = quantization.get("config_groups")
        weights = [each.get("weights") for each in groups.values()] if isinstance(groups, Mapping) else []
        if weights and all(map(_is_float8, weights)) and len({each["strategy"] == "block" for each in weights}) == 1:
            return 128 if weights[0]["strategy"] == "block" else None
    details = {key: quantization[key] for key in ("format", "bits", "weight_block_size") if key in quantization}
    raise CheckpointError(
        f"the checkpoint is quantised (`quant_method`={method!r}{f', {details}' if details else ''}), and jaxgen reads "
        f"8-bit floats with scales per tensor, channel or block of 128 only. {_HOW_TO_GO_ON}"
    )


def _is_float8(weights: Any) -> bool:
    if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return False
    strategy = weights.get("strategy")
    return strategy in ("tensor", "channel") or (strategy == "block" and weights.get("block_structure") == [128, 128])


def _check_scale(weight: Tensor, scale: Tensor, block: int | None) -> None:
    rows, *columns = weight.shape or (1,)
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows,), (rows, 1)]
    if block and len(columns) == 1:
        shapes = [(-(-rows // block), -(-columns[0] // block))]
    if len(columns) != 1 or scale.shape not in shapes or scale.dtype not in DTYPES.values():
        raise CheckpointError(
            f"`{weight.name}` of shape {weight.shape} has a scale of {scale.dtype} {scale.shape}, where "
            f"one of the shapes {shapes} is expected. {_HOW_TO_GO_ON}"
        )


def wide_dtype(raw: Mapping[str, Any], embedding: np.dtype | None) -> np.dtype:
    """What 8-bit weights are multiplied out to: the dtype of the config, else that of the embedding, else bfloat16."""
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    if named not in known and embedding is not None and embedding in known.values():
        return embedding
    return known.get(named, known["bfloat16"])

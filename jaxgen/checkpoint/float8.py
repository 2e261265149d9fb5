"""Quantised checkpoints: 8-bit floats are dequantised as they are read. Any other scheme is refused and named.

Three layouts are supported: one scale per tensor, one per output channel, one per block of 128 by 128. The weight is
always multiplied by the stored scale, even if that is called `weight_scale_inv` (transformers 5.24 `Fp8Dequantize`,
compressed-tensors "float-quantized").
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxgen.checkpoint.files import CheckpointError, Json
from jaxgen.checkpoint.safetensors_file import DTYPES, FLOAT8, ComputedTensor, Tensor

KEYS = ("quantization_config", "compression_config")  # of config.json

_SCALES = ("weight_scale", "weight_scale_inv")
# Scales of activations and of the KV cache, neither of which is quantised here.
_UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub")
# Tensor name suffixes that reveal other schemes, for checkpoints whose config does not name one.
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
    """An 8-bit weight [out, in] times its scale, rounded to `dtype`.

    Attributes:
        scale: [], [1] or [1, 1] for the whole tensor; [out] or [out, 1] for rows; [out / block, in / block], rounded
            up, for blocks.
        block: the rows and columns of a block; None for the other layouts.
    """

    weight: Tensor
    scale: Tensor
    block: int | None

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        scale = np.empty((self.scale.rows, *self.scale.shape[1:]), np.float32)
        self.scale.read_into(scale)
        # A block of rows at a time: in float32 the whole weight would take four times its size.
        done = 0
        for rows in self.weight.blocks(start, start + len(out)):
            wide = rows.astype(np.float32)
            if self.block:
                # Row r and column c have scale[r // block, c // block]; the last blocks may be cut short.
                block_rows = np.arange(start + done, start + done + len(rows)) // self.block
                wide *= np.repeat(scale[block_rows], self.block, axis=1)[:, : wide.shape[1]]
            elif scale.size == 1:
                wide *= scale.reshape(())
            else:
                wide *= scale.reshape(-1, 1)[start + done : start + done + len(rows)]
            out[done : done + len(rows)] = wide
            done += len(rows)


def dequantised(tensors: Mapping[str, Tensor], raw: Json, embedding: np.dtype | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with each 8-bit weight and its scale replaced by a `ScaledTensor`.

    Args:
        tensors: by name.
        raw: the config.json.
        embedding: the dtype of the token embedding, if there is one.

    Raises:
        CheckpointError: if the checkpoint is quantised in another way, or the shapes of a weight and its scale do not
            match.
    """
    quantization = next((raw[key] for key in KEYS if raw.get(key)), None)
    marks = {mark for mark in _MARKS for name in tensors if name.endswith(mark)}
    if marks and not quantization:
        schemes = sorted({_MARKS[mark] for mark in marks})
        raise CheckpointError(f"its tensors look quantised by {' or '.join(schemes)}. {_HOW_TO_GO_ON}")
    if quantization:
        block = block_size(quantization)
    elif any(tensor.dtype in FLOAT8.values() for tensor in tensors.values()):
        raise CheckpointError(
            "its tensors are 8-bit floats, but config.json has no `quantization_config` to say how they are scaled. "
            + _HOW_TO_GO_ON
        )
    else:
        return dict(tensors)
    dtype = wide_dtype(raw, embedding)
    # "x.weight_scale" and "x.weight_scale_inv" -> "x.weight"
    scales = {name[: name.rindex("_scale")]: tensor for name, tensor in tensors.items() if name.endswith(_SCALES)}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8.values():
            if name not in scales:
                raise CheckpointError(f"`{name}` is an 8-bit float without a scale. {_HOW_TO_GO_ON}")
            scale = scales.pop(name)
            _check_scale(tensor, scale, block)
            result[name] = ScaledTensor(name, dtype, tensor.shape, tensor, scale, block)
        elif not name.endswith((*_SCALES, *_UNUSED)):
            result[name] = tensor
    if all(result.get(name) is tensor for name, tensor in tensors.items()):
        raise CheckpointError(
            f"config.json has `{KEYS[0]}`={quantization!r}, but no tensor is an 8-bit float. If these are "
            "the unquantised weights, remove that key."
        )
    if scales:  # each was removed when its weight was found
        raise CheckpointError(f"`{min(scales)}` has a scale, but is not an 8-bit float. {_HOW_TO_GO_ON}")
    return result


def block_size(quantization: object) -> int | None:
    """The rows and columns of a block; None if scales are per tensor or channel."""
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"`quantization_config`={quantization!r} in config.json is not an object. {_HOW_TO_GO_ON}"
        )
    method = quantization.get("quant_method")
    block_shape = quantization.get("weight_block_size")
    if method in ("fp8", "fbgemm_fp8") and block_shape in (None, [128, 128]):
        return 128 if block_shape else None
    if method == "compressed-tensors" and quantization.get("format") in ("float-quantized", "naive-quantized"):
        groups = quantization.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        if weights and all(map(_is_float8, weights)) and len({spec["strategy"] == "block" for spec in weights}) == 1:
            return 128 if weights[0]["strategy"] == "block" else None
    details = {key: quantization[key] for key in ("format", "bits", "weight_block_size") if key in quantization}
    raise CheckpointError(
        f"the checkpoint is quantised (`quant_method`={method!r}{f', {details}' if details else ''}), and jaxgen reads "
        f"only 8-bit floats with a scale per tensor, channel or block of 128. {_HOW_TO_GO_ON}"
    )


def _is_float8(weights: object) -> bool:
    if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return False
    strategy = weights.get("strategy")
    return strategy in ("tensor", "channel") or (strategy == "block" and weights.get("block_structure") == [128, 128])


def _check_scale(weight: Tensor, scale: Tensor, block: int | None) -> None:
    rows, *columns = weight.shape or (1,)
    # All shapes of a scale per tensor or per row, or one scale per block, with partial blocks at the end.
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows,), (rows, 1)]
    if block and len(columns) == 1:
        shapes = [(-(-rows // block), -(-columns[0] // block))]
    if len(columns) != 1 or scale.shape not in shapes or scale.dtype not in DTYPES.values():
        raise CheckpointError(
            f"`{weight.name}` of shape {weight.shape} has a scale of {scale.dtype} {scale.shape}, but "
            f"its shape must be one of {shapes}. {_HOW_TO_GO_ON}"
        )


def wide_dtype(raw: Json, embedding: np.dtype | None) -> np.dtype:
    """The dtype that 8-bit weights are dequantised to: the config's, else the embedding's, else bfloat16."""
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    if named not in known and embedding is not None and embedding in known.values():
        return embedding
    return known.get(named, known["bfloat16"])

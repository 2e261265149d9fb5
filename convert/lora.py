"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), added to the weights they were trained for; peft's format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoint import listed
from jaxgen.folder import CheckpointError, holds, read_json
from jaxgen.safetensors_file import DTYPES, ComputedTensor, Tensor, read_header

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What peft can do besides, where one of these is set.
_UNSUPPORTED = (
    "use_dora rank_pattern alpha_pattern modules_to_save layer_replication fan_in_fan_out alora_invocation_tokens "
    "use_qalora use_bdlora trainable_token_indices target_parameters lora_bias arrow_config"
).split()
# Beginnings that took something away from the base model's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class MergedTensor(ComputedTensor):
    """A weight [out, in] plus `scaling * up @ down`, in float32 and rounded to the weight's dtype.

    Attributes:
        down: [rank, in].
        up: [out, rank].
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    weight: Tensor
    down: Tensor
    up: Tensor
    scaling: float

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        up = np.empty((len(out), *self.up.shape[1:]), np.float32)
        down = np.empty(self.down.shape, np.float32)
        self.up.read_into(up, start)
        self.down.read_into(down)
        weight = np.empty(out.shape, np.float32)
        self.weight.read_into(weight, start)
        out[...] = weight + self.scaling * (up @ down)


def merged(pieces: Mapping[str, list[Tensor]], folder: Path) -> dict[str, list[Tensor]]:
    """The tensors of a model with an adapter added to them.

    Args:
        pieces: parameter path -> its tensors.
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: if the adapter is of another kind, or does not fit the model.
    """
    if not holds(folder, _CONFIG):
        raise CheckpointError(f"{folder} holds no {_CONFIG}. Pass the folder of a LoRA adapter.")
    if not holds(folder, _WEIGHTS):
        raise CheckpointError(f"{folder} holds no {_WEIGHTS}. Save the adapter as safetensors; its pickle is not read.")
    config = read_json(folder, _CONFIG)
    scaling = _scaling(folder, config)
    tensors = read_header(folder, _WEIGHTS)
    weights = {tensor.name: tensor for parts in pieces.values() for tensor in parts}
    changed: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        target = weights.get(module.removeprefix(_PREFIX) + ".weight")
        down, up = tensors.pop(name), tensors.pop(f"{module}.lora_B.weight", None)
        if target is None or up is None or len(target.shape) != 2:
            raise CheckpointError(f"{folder}: `{name}` has no weight in this model to go to, or no `lora_B` beside it.")
        _check_shapes(folder, target, down, up, config["r"])
        changed[target.name] = MergedTensor(target.name, target.dtype, target.shape, target, down, up, scaling)
    if tensors or not changed:
        raise CheckpointError(
            f"{folder} holds {listed(sorted(tensors))}, which only weights [out, in] have a place for."
        )
    return {path: [changed.get(part.name, part) for part in parts] for path, parts in pieces.items()}


def _scaling(folder: Path, config: Mapping[str, Any]) -> float:
    """What the product of the two matrices is multiplied with."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: `peft_type`={config.get('peft_type')!r} is not 'LORA'. Merge it with peft.")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{folder}: `{key}`={config[key]!r} is not supported. Merge the adapter with peft.")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{folder}: with `init_lora_weights`={config['init_lora_weights']!r} the adapter belongs to a changed base "
            "model. Merge it with peft."
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{folder}: `bias`={config['bias']!r} is not supported. Merge the adapter with peft.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise CheckpointError(f"{folder}: `r`={rank!r} and `lora_alpha`={alpha!r} must be numbers, `r` at least 1.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(folder: Path, target: Tensor, down: Tensor, up: Tensor, rank: int) -> None:
    (rows, columns), wanted = target.shape, set(DTYPES.values())
    if (up.shape, down.shape) != ((rows, rank), (rank, columns)) or not {up.dtype, down.dtype} <= wanted:
        raise CheckpointError(
            f"{folder}: `{up.name}` {up.shape} and `{down.name}` {down.shape} do not fit `{target.name}` "
            f"{target.shape} with `r`={rank}."
        )

"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), added to the weights they were trained for; peft's format."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxgen.checkpoint.files import CheckpointError, Json, holds, read_json
from jaxgen.checkpoint.folder import listed
from jaxgen.checkpoint.safetensors_file import DTYPES, ComputedTensor, StoredTensor, Tensor, read_header
from jaxgen.checkpoint.source import same_bytes

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys of peft features that change the product; refused if set.
_UNSUPPORTED = (
    "use_dora rank_pattern alpha_pattern layer_replication fan_in_fan_out alora_invocation_tokens use_qalora "
    "use_bdlora trainable_token_indices target_parameters lora_bias arrow_config ensure_weight_tying"
).split()
# Initialisations that subtract something from the base model's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
# peft's names for the two factors of a weight [out, in] and of an embedding, and for the layer's own weight.
_LINEAR, _EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
_BASE = ".base_layer.weight"
_HEAD, _EMBEDDINGS = "lm_head.weight", ("lm_head.weight", "model.embed_tokens.weight")
_MERGE_WITH_PEFT = "Merge the adapter with peft (`merge_and_unload`), and convert what it saves."


@dataclass(frozen=True)
class MergedTensor(ComputedTensor):
    """A weight [out, in] plus `scaling * up @ down`, computed in float32 and rounded to the weight's dtype.

    Attributes:
        weight: [out, in], the base model's weight.
        down: [rank, in].
        up: [out, rank].
        scaling: the factor of the product.
    """

    weight: Tensor
    down: StoredTensor
    up: StoredTensor
    scaling: float

    def read(self, out: np.ndarray, start: int) -> None:
        """See `Tensor.read`."""
        weight = np.empty(out.shape, np.float64 if self.weight.dtype == np.float64 else np.float32)
        self.weight.read_into(weight, start)
        out[...] = weight + self.scaling * self._product(start, len(out))

    def _product(self, start: int, count: int) -> np.ndarray:
        return _read(self.up, start, count) @ _read(self.down)


@dataclass(frozen=True)
class MergedEmbedding(MergedTensor):
    """An embedding [V, D]. Its two factors are transposed in peft.

    Attributes:
        down: [rank, V].
        up: [D, rank].
    """

    def _product(self, start: int, count: int) -> np.ndarray:
        # Rows [start, start + count) of the product need these columns of `down`. Tensors are read by rows, so it is
        # read as one flat tensor, `count` numbers at a time.
        rank, vocab_size = self.down.shape
        flat = replace(self.down, shape=(rank * vocab_size,))
        columns = [_read(flat, row * vocab_size + start, count) for row in range(rank)]
        return np.stack(columns, axis=1) @ _read(self.up).T


def _read(tensor: Tensor, start: int = 0, count: int | None = None) -> np.ndarray:
    """`count` rows as float32; all of them by default."""
    out = np.empty((tensor.rows if count is None else count, *tensor.shape[1:]), np.float32)
    tensor.read_into(out, start)
    return out


def merged(pieces: Mapping[str, list[Tensor]], folder: Path) -> dict[str, list[Tensor]]:
    """The tensors of a model with an adapter added to them, as peft merges it.

    Whole weights in the adapter, from `modules_to_save` or a resized vocabulary, replace those of the model.

    Args:
        pieces: parameter path -> its tensors.
        folder: the folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: if it is not a plain LoRA adapter, or does not fit the model.
    """
    if not holds(folder, _CONFIG):
        raise CheckpointError(f"{folder} does not hold {_CONFIG}. Pass the folder of a LoRA adapter.")
    if not holds(folder, _WEIGHTS):
        raise CheckpointError(f"{folder} lacks {_WEIGHTS}. Save the adapter as safetensors; its pickle is not read.")
    config = read_json(folder, _CONFIG)
    scaling = _scaling(folder, config)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_header(folder, _WEIGHTS).items()}
    weights = {tensor.name: tensor for parts in pieces.values() for tensor in parts}
    # Otherwise a module whose tensors are missing would keep the base model's weights without notice.
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in tensors):
            raise CheckpointError(f"{folder} names {module!r} in `modules_to_save`, but does not hold its tensors.")
    if _HEAD not in weights:
        tensors = _without_shared_copy(folder, tensors)
    changed: dict[str, Tensor] = {}
    # First whole weights, then products, which are added to a replaced weight if there is one.
    for name in [name for name in tensors if name.removesuffix(_BASE) + ".weight" in weights or name in weights]:
        target = weights[name if name in weights else name.removesuffix(_BASE) + ".weight"]
        changed[target.name] = _replacement(folder, target, tensors.pop(name))
    for kind, (first, second) in ((MergedTensor, _LINEAR), (MergedEmbedding, _EMBEDDING)):
        for name in [name for name in tensors if name.endswith(first)]:
            module = name.removesuffix(first)
            target = changed.get(f"{module}.weight", weights.get(f"{module}.weight"))
            down, up = tensors.pop(name), tensors.pop(module + second, None)
            if target is None or up is None or len(target.shape) != 2:
                raise CheckpointError(
                    f"{folder}: the model has no weight for `{name}`, or the adapter no `{second[1:]}` for it."
                )
            _check_shapes(folder, target.shape if kind is MergedTensor else target.shape[::-1], down, up, config["r"])
            changed[target.name] = kind(target.name, target.dtype, target.shape, target, down, up, scaling)
    if tensors or not changed:
        raise CheckpointError(f"{folder} holds {listed(sorted(tensors))}, which jaxgen cannot add. {_MERGE_WITH_PEFT}")
    _check_vocabulary(folder, weights | changed)
    return {path: [changed.get(part.name, part) for part in parts] for path, parts in pieces.items()}


def _without_shared_copy(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without the head's, if the model ties its head to the embedding and both have equal tensors."""
    modules = tuple(name.removesuffix("weight") for name in _EMBEDDINGS)
    touched = sorted(name for name in tensors if name.startswith(modules))
    if not touched:
        return dict(tensors)
    head, embedding = (tensors.get(name) for name in _EMBEDDINGS)
    if len(touched) > 2 or head is None or embedding is None or not same_bytes(head, embedding):
        raise CheckpointError(
            f"{folder} changes {listed(touched)}, but the model has one weight for its embedding and its head "
            "(`tie_word_embeddings`), and the two would then differ. Give the base model a head of its own "
            "with transformers (`model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())`, "
            "`model.config.tie_word_embeddings = False`, `save_pretrained`), and merge into that."
        )
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _replacement(folder: Path, target: Tensor, tensor: StoredTensor) -> Tensor:
    """A whole weight of the adapter, under the name of the model's weight that it replaces."""
    resizable = target.name in _EMBEDDINGS and len(tensor.shape) == 2
    rows = tensor.shape[0] if resizable else target.rows
    if tensor.shape != (rows, *target.shape[1:]) or tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{folder}: `{tensor.name}` of {tensor.dtype} {tensor.shape} does not fit `{target.name}` {target.shape}. "
            + _MERGE_WITH_PEFT
        )
    return replace(tensor, name=target.name)


def _check_vocabulary(folder: Path, weights: Mapping[str, Tensor]) -> None:
    rows = {name: weights[name].rows for name in _EMBEDDINGS if name in weights}
    if len({*rows.values()}) > 1:
        raise CheckpointError(f"{folder} resizes one of {rows} (rows) but not the other. {_MERGE_WITH_PEFT}")


def _scaling(folder: Path, config: Json) -> float:
    """The factor of the product of the two low-rank matrices."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: `peft_type`={config.get('peft_type')!r} is not 'LORA'. {_MERGE_WITH_PEFT}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{folder}: `{key}`={config[key]!r} is not supported. {_MERGE_WITH_PEFT}")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{folder}: with `init_lora_weights`={config['init_lora_weights']!r} the adapter belongs to a changed base "
            "model. " + _MERGE_WITH_PEFT
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{folder}: `bias`={config['bias']!r} is not supported. {_MERGE_WITH_PEFT}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise CheckpointError(f"{folder}: `r`={rank!r} and `lora_alpha`={alpha!r} must be numbers, `r` at least 1.")
    # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by the root of the rank.
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(folder: Path, shape: tuple[int, ...], down: Tensor, up: Tensor, rank: int) -> None:
    (rows, columns), wanted = shape, set(DTYPES.values())
    if (up.shape, down.shape) != ((rows, rank), (rank, columns)) or not {up.dtype, down.dtype} <= wanted:
        raise CheckpointError(
            f"{folder}: `{up.name}` {up.shape} and `{down.name}` {down.shape} do not fit a weight {shape} with "
            f"`r`={rank}."
        )

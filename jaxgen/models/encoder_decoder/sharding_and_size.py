"""What the `Family`s of encoder-decoder models share: how they are sharded and sized."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.base import tensor_shards
from jaxgen.models.family import ForwardPass
from jaxgen.models.layers import columns_at_once


def partition_of(
    sizes: Mapping[str, int], by_rows: Collection[str], by_columns: Collection[str], mesh: Mesh | AbstractMesh
) -> Callable[[str], PartitionSpec]:
    """How each parameter, by its path, is sharded over the mesh axis "tensor"; see `llama_family.partition`.

    Args:
        sizes: the numbers of heads and units, by their keys in config.json.
        by_rows: ends of the paths of weights that produce heads, units or vocabulary entries.
        by_columns: ends of the paths of weights that consume them.
        mesh: of the model.

    Raises:
        ValueError: if the axis does not divide one of the sizes.
    """
    shards = tensor_shards(mesh)
    for key, size in sizes.items():
        if size % shards:
            raise ValueError(
                f'`{key}`={size} cannot be spread over the {shards} devices of the axis "tensor". Choose a mesh whose '
                "axis divides it."
            )

    def spec(path: str) -> PartitionSpec:
        if shards == 1:
            return PartitionSpec()
        if path.endswith(tuple(by_rows)):
            return PartitionSpec("tensor")
        return PartitionSpec(None, "tensor") if path.endswith(tuple(by_columns)) else PartitionSpec()

    return spec


def of_source(path: str) -> bool:
    """See `Family.of_source`: the encoder, and the keys and values that each layer of the decoder keeps of it."""
    return path.startswith("encoder.") or ".kv_proj." in path


def activation_bytes(config: Any, forward: ForwardPass) -> int:
    """See `Family.activation_bytes`: scores, projections and units of the largest layer, and the residual stream."""
    rows, columns, item = forward.rows, forward.columns, forward.itemsize
    scores = 2 * 4 * rows * max(config.heads) // forward.shards * columns_at_once(columns) * forward.slots
    if columns < forward.slots:  # a step, in which all but the scores is negligible
        return scores
    heads = item * rows * columns * 3 * config.heads[1] * config.head_dim // forward.shards
    units = 3 * item * rows * columns * max(config.units) // forward.shards
    return max(scores + heads, units) + 2 * item * rows * columns * config.hidden_size

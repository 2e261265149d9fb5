"""How the parameters of a model are sharded: the same for all families, but for their names."""

from collections.abc import Callable, Collection, Mapping

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.base import tensor_shards


def partition_of(
    sizes: Mapping[str, int], by_rows: Collection[str], by_columns: Collection[str], mesh: Mesh | AbstractMesh
) -> Callable[[str], PartitionSpec]:
    """How each parameter, by its path, is sharded over the mesh axis "tensor".

    Weights [out, in] that produce heads or units, and embedding and head [V, D], are sharded by rows. Weights that
    consume heads or units are sharded by columns. All others are replicated.

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

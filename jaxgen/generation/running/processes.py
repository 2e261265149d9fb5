"""The processes that run a call together: who shares rows with whom, and the part of the model that each has.

The rows of a call are spread over the mesh axis "data", so each process passes and gets back its own. Processes that
hold parts of the same rows, as an axis "tensor" over several hosts makes them, are a group, and pass the same rows:

```
data            0          1          2          3
tensor        0   1      0   1      0   1      0   1
process       0   1      0   1      2   3      2   3        groups: processes 0 and 1, processes 2 and 3
```

The weights are whole in each group. So a group runs the programs of a single process on its part of the mesh, without
waiting for other groups at every step: whatever a row's neighbours are, it gets the tokens that a single process gives.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import Model
from jaxgen.exchange import moved, received, send


class Processes:
    """The processes of a mesh.

    Attributes:
        mesh: of all processes.
        own_mesh: the part of it that the group of this process has.
        groups: the processes of each group.
        group: the number of this process's group.
        calls: the number of calls so far.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        parts = _groups(mesh)
        self.groups = [processes for processes, _ in parts]
        self.group = next(number for number, group in enumerate(self.groups) if jax.process_index() in group)
        rows = parts[self.group][1]
        self.own_mesh = mesh
        if len(parts) > 1:
            self.own_mesh = Mesh(np.take(mesh.devices, rows, axis=mesh.axis_names.index("data")), mesh.axis_names)
        self.calls = 0

    @functools.cached_property
    def seed(self) -> int:
        """A random number that is the same in all processes: the one of the first process."""
        mine = np.random.SeedSequence().generate_state(1).view(np.int32)
        return int(next(iter(received(self.mesh, send(self.mesh, mine)).values())).view(np.uint32)[0])

    def entropy(self) -> int:
        """A seed of 64 bits for the rows of this group in this call: the same in the group, and another in others."""
        words = np.random.SeedSequence([self.seed, self.calls, self.group]).generate_state(1, np.uint64)
        return int(words[0])

    def own(self, model: Model) -> Model:
        """The model on the group's part of the mesh, which gets all of the weights if it does not have them yet."""
        if len(self.groups) == 1:
            return model
        leaves, treedef = jax.tree.flatten(model)
        shardings = [_whole_in_each_group(leaf.sharding, self.mesh) for leaf in leaves]
        apart = [None if leaf.sharding == whole else whole for leaf, whole in zip(leaves, shardings, strict=True)]
        return treedef.unflatten(moved(leaves, apart)).on(self.own_mesh)


def processes_of(model: Model) -> Processes | None:
    """The processes that hold a part of the model; None if this process has all of it."""
    if jax.process_count() == 1:
        return None
    mesh: Any = model.mesh
    if mesh is None:  # unless the user has moved it to one
        mesh = getattr(jax.tree.leaves(model)[0].sharding, "mesh", None)
    if mesh is None or all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return None
    return _processes(mesh)


_processes = functools.lru_cache(maxsize=8)(Processes)


def _groups(mesh: Mesh) -> list[tuple[set[int], list[int]]]:
    """The groups of processes that share rows, and the indices along the axis "data" that each of them has."""
    devices = mesh.devices.reshape(1, -1)
    if "data" in mesh.axis_names:
        devices = np.moveaxis(mesh.devices, mesh.axis_names.index("data"), 0).reshape(mesh.shape["data"], -1)
    groups: list[tuple[set[int], list[int]]] = []
    for index, row in enumerate(devices):
        processes, rows = {device.process_index for device in row}, [index]
        for other in [group for group in groups if group[0] & processes]:
            groups.remove(other)
            processes, rows = processes | other[0], sorted(other[1] + rows)
        groups.append((processes, rows))
    return groups


def _whole_in_each_group(sharding: Any, mesh: Mesh) -> NamedSharding:
    """As the sharding, but not over "data"; replicated if it is of another mesh."""
    if sharding.mesh.axis_names != mesh.axis_names or (sharding.mesh.devices != mesh.devices).any():
        return NamedSharding(mesh, PartitionSpec())
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec]
    spec = [tuple(name for name in each if name not in ("data", None)) or None for each in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*(each[0] if each and len(each) == 1 else each for each in spec)))

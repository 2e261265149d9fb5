"""What the processes of a mesh send each other.

Each function but `received` runs a program on all devices of the mesh, so all of its processes have to call it, in the
same order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def send(mesh: Mesh, values: np.ndarray) -> jax.Array:
    """Sends int32 [X] to all processes, without waiting. X must be the same in all of them."""
    devices = _in_a_row(mesh)
    # A row per device, since the devices of a mesh may be spread unevenly over the processes.
    sharding = NamedSharding(devices, PartitionSpec("device"))
    rows = jax.make_array_from_callback((mesh.size, len(values)), sharding, lambda index: values[None])
    return moved([rows], [NamedSharding(devices, PartitionSpec())])[0]


def received(mesh: Mesh, sent: jax.Array) -> dict[int, np.ndarray]:
    """What each process has sent, int32 [X] by the number of the process."""
    rows = jax.device_get(sent)
    return {device.process_index: row for device, row in zip(mesh.devices.flat, rows, strict=True)}


def exchange(mesh: Mesh, text: str) -> dict[int, str]:
    """Sends a text to all processes, and returns that of each one."""
    data = text.encode()
    lengths_sent = received(mesh, send(mesh, np.array([len(data)], np.int32)))
    lengths = {process: int(length[0]) for process, length in lengths_sent.items()}
    words = np.zeros(1 << (max(1, -(-max(lengths.values()) // 4)) - 1).bit_length(), np.int32)
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    texts = received(mesh, send(mesh, words))
    return {process: row.view(np.uint8)[: lengths[process]].tobytes().decode() for process, row in texts.items()}


def fetch(tree: Any) -> Any:
    """A pytree with NumPy arrays in place of those of JAX, also where other processes hold a part of them."""

    def whole(leaf: Any) -> NamedSharding | None:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return None
        mesh: Any = getattr(leaf.sharding, "mesh", None)
        return NamedSharding(mesh, PartitionSpec())

    leaves, treedef = jax.tree.flatten(tree)
    # `device_get` can be interrupted while the device runs, `np.asarray` cannot.
    return treedef.unflatten(jax.device_get(moved(leaves, [whole(leaf) for leaf in leaves])))


def moved(arrays: Sequence[Any], shardings: Sequence[NamedSharding | None]) -> list[Any]:
    """The arrays, each with its sharding, and those without one as they are."""
    moving = [number for number, sharding in enumerate(shardings) if sharding is not None]
    results = [*arrays]
    if moving:
        move = _program(*(shardings[number] for number in moving))
        for number, result in zip(moving, move([arrays[number] for number in moving]), strict=True):
            results[number] = result
    return results


@functools.lru_cache(maxsize=64)
def _program(*shardings: NamedSharding | None) -> Any:
    return jax.jit(lambda arrays: arrays, out_shardings=[*shardings])


def _in_a_row(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices.reshape(-1), "device")

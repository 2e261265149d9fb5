"""What the processes of a mesh do together: gather an array, and take a step that ends well in all of them or in none.

Each of these is a program that all processes of the mesh have to run, in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import no_mesh

_MOST = 1024  # bytes of an error message that other processes get to see


def processes_of(mesh: Mesh | None) -> list[int]:
    """The processes whose devices a model is on, in order."""
    return sorted({each.process_index for each in mesh.devices.flat}) if mesh else [jax.process_index()]


def gathered(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """An array on a mesh of several processes, with all of its values on each device."""
    if mesh is not None and len(processes_of(mesh)) > 1:
        with no_mesh():
            array = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
        array.block_until_ready()  # or a process that needs none of the values would have many arrays under way
    return array


def _identity(array: jax.Array) -> jax.Array:
    return array


@contextmanager
def together(mesh: Mesh | None) -> Iterator[None]:
    """A step that ends in all processes at the same time. If it fails in some, the others raise an OSError."""
    if mesh is None or len(processes_of(mesh)) == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    # One row for each device, so that every process fills its own.
    row = np.zeros((1, _MOST), np.uint8)
    message = ("" if failure is None else f"{type(failure).__name__}: {failure}").encode()[:_MOST]
    row[0, : len(message)] = [*message]
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    rows = jax.device_get(
        gathered(jax.make_array_from_callback((mesh.size, _MOST), by_device, lambda index: row), mesh)
    )
    if failure is not None:
        raise failure
    for device, row in zip(mesh.devices.flat, rows, strict=True):
        if row.any():
            text = row.tobytes().rstrip(b"\0").decode(errors="replace")
            raise OSError(f"process {device.process_index} failed, and so do all others: {text}")

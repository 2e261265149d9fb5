"""What the processes of a mesh do together: gather an array, and take a step that ends well in all of them or in none.

Each of these is a program that all processes of the mesh have to run, in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import no_mesh
from jaxgen.exchange import exchange, moved


def processes_of(mesh: Mesh | None) -> list[int]:
    """The processes whose devices a model is on, in order."""
    return sorted({each.process_index for each in mesh.devices.flat}) if mesh else [jax.process_index()]


def gathered(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """An array on a mesh of several processes, with all of its values on each device."""
    if mesh is not None and len(processes_of(mesh)) > 1:
        with no_mesh():
            array = moved([array], [NamedSharding(mesh, PartitionSpec())])[0]
        array.block_until_ready()  # or a process that needs none of the values would have many arrays under way
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
    with no_mesh():
        messages = exchange(mesh, "" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for process, message in messages.items():
        if message:
            raise OSError(f"process {process} failed, and so do all others: {message}")

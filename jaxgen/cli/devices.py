"""The devices of a command: `--mesh`, and `--distributed` for the devices of several processes."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax
from jax.sharding import Mesh


def check_devices() -> None:
    """Raises ValueError if JAX has no device to run on."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises either, depending on what is missing
        raise ValueError(f"JAX finds no device to run on ({error}). Run `jaxgen doctor` to learn more.") from error


def join_processes() -> None:
    """Connects to the other processes of `--distributed`. Must come before anything that needs JAX's devices.

    JAX finds the processes of Slurm, Open MPI, Kubernetes and TPU pods. Elsewhere it reads JAX_COORDINATOR_ADDRESS, and
    leaves the number and the place of the process to its caller.

    Raises:
        ValueError: if it does not find them.
    """
    processes, process = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=processes, process_id=process)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed does not find the other processes ({str(error).rstrip('.')}). Start all of them with srun "
            "or mpirun, as a Kubernetes job or on every host of a TPU pod; or set JAX_COORDINATOR_ADDRESS, the host "
            "and port of the first process, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    check_devices()


def _number(name: str) -> int | None:
    """The number in a variable of the environment."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name}={text} must be a number. Set it to one, or leave it out.")
    return None if text is None else int(text)


@contextlib.contextmanager
def first_process_speaks() -> Iterator[None]:
    """Discards what the other processes print. Errors leave the body, so every process can show its own.

    Standard output then holds only the text: Gloo, which connects CPUs, writes to its file descriptor, so that is
    standard error meanwhile.
    """
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.ExitStack() as redirected:
            nowhere = redirected.enter_context(open(os.devnull, "w"))
            if jax.process_index() > 0:
                redirected.enter_context(contextlib.redirect_stdout(nowhere))
                redirected.enter_context(contextlib.redirect_stderr(nowhere))
            else:
                as_before = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
                own = redirected.enter_context(open(descriptor, "w", closefd=False, **as_before))
                redirected.enter_context(contextlib.redirect_stdout(own))
            yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # as the errors of XLA
            raise
        raise ValueError(str(error)) from error  # another process stopped the call
    finally:
        os.dup2(descriptor, 1)
        os.close(descriptor)


def mesh_sizes(text: str) -> tuple[int, int]:
    """The sizes of the axes "data" and "tensor", of `tensor=8`, `data=2,tensor=4` or `2x4`.

    Raises:
        ValueError: if the text is none of these.
    """
    sizes = {"data": 1, "tensor": 1}
    if both := re.fullmatch(r"(\d+)x(\d+)", text):
        sizes = {"data": int(both[1]), "tensor": int(both[2])}
    else:
        named = [re.fullmatch(r"(data|tensor)=(\d+)", part) for part in text.split(",")]
        given = {part[1]: int(part[2]) for part in named if part}
        sizes = sizes | given if len(given) == len(named) else {}
    if not all(sizes.values()) or not sizes:
        raise ValueError(
            f"--mesh {text} must be numbers of devices, at least 1, such as tensor=8, data=2,tensor=4 or 2x4."
        )
    return sizes["data"], sizes["tensor"]


def mesh_of(arguments: argparse.Namespace) -> Mesh | None:
    """The mesh that the arguments ask for: with `--distributed`, "tensor" over all devices by default.

    Raises:
        ValueError: if there are not so many devices, or if a process would have none of them or a text of its own.
    """
    devices, processes = jax.device_count(), jax.process_count()
    if arguments.mesh is None:
        return jax.make_mesh((1, devices), ("data", "tensor")) if arguments.distributed else None
    data, tensor = mesh_sizes(arguments.mesh)
    given = f"--mesh {arguments.mesh}"
    if data * tensor > devices:
        raise ValueError(f"{given} needs {data * tensor} devices, but there are {devices}. Choose a smaller one.")
    if data > 1 and processes > 1:
        raise ValueError(
            f"{given} would give {data} shares of the rows to {processes} processes, but they have one text between "
            f"them. Choose --mesh tensor={devices}; processes with texts of their own call `jaxgen.generate` from "
            "Python."
        )
    if tensor < devices and processes > 1:
        raise ValueError(
            f"{given} has {tensor} of the {devices} devices of {processes} processes, and each process must bring all "
            f"of its own. Choose --mesh tensor={devices}, or start fewer processes."
        )
    return jax.make_mesh((data, tensor), ("data", "tensor"))

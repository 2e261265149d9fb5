"""Shared by the benchmarks: timing, the description of the machine, records, and the calls that are measured."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgen
from jaxgen.planning.shapes import SHAPES

# The ways to decode that are compared, in the arguments of `generate`.
DECODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 50, "top_p": 0.9},
    "beams": {"num_beams": 4},
}
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"),
    *("transformers", "torch", "keras-hub", "llama-cpp-python"),
)


# Bytes read at once to measure the bandwidth: much more than any cache of the processor holds.
READ_BYTES = {"cpu": 1 << 29, "gpu": 1 << 31, "tpu": 1 << 31}


def positive(text: str) -> int:
    """Parses a positive integer on the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_times(calls: dict[Any, Callable[[int], Any]], steps: int, repeats: int) -> dict[Any, list[float]]:
    """Milliseconds of a decode step, once per repeat: calls for `1 + steps` tokens minus calls for one, over `steps`.

    Args:
        calls: by the varied value; each takes a number of new tokens. They alternate, after one of each that compiles.
        steps: further tokens.
        repeats: timed calls of each.
    """
    times: dict[Any, list[float]] = {value: [] for value in calls}
    for call in calls.values():
        call(1 + steps)
        call(1)
    for _ in range(repeats):
        for value, call in calls.items():
            longer = seconds(lambda call=call: call(1 + steps))
            times[value].append((longer - seconds(lambda call=call: call(1))) / steps * 1e3)
    return times


def machine() -> dict[str, Any]:
    """The machine, the device, the versions and the date of a figure."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.local_devices()[0].device_kind,
        "versions": {"jaxgen": jaxgen.__version__} | {name: found for name in _PACKAGES if (found := _version(name))},
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record(file: Path | None, figures: dict[str, Any]) -> None:
    """Appends figures and the machine to a file of JSON lines, if one is given."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps({**figures, **machine()}) + "\n")


def varied(shape: str) -> dict[str, Any]:
    """The config of a shape, with an initializer range for which random weights decode to varied texts.

    With the usual 0.02, the outputs of narrow layers vanish beside the embedding of the last token, and every text
    repeats that token: any two systems would agree. Here a matmul's output has a standard deviation of 1.2 at any
    width, which is enough. With much more, attention picks single positions, and rounding in bfloat16 changes texts.
    """
    return SHAPES[shape] | {"initializer_range": 1.2 / SHAPES[shape]["hidden_size"] ** 0.5}


def random_prompts(vocab_size: int, rows: int, columns: int) -> np.ndarray:
    """int [B, P] of ids, the same at every call."""
    return np.random.default_rng(rows).integers(3, vocab_size, (rows, columns))


def continued(model: Any, prompts: np.ndarray, new_tokens: int, **kwargs: Any) -> Any:
    """The output of `generate` for prompts without padding, int [B, P], and without an eos."""
    mask = np.ones_like(prompts)
    return jaxgen.generate(model, prompts, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, **kwargs)


def cache_options(backend: str | None) -> dict[str, Any]:
    """The arguments of `generate` for a cache that is quantised in this way; none for None."""
    return {} if backend is None else {"cache_implementation": "quantized", "cache_config": {"backend": backend}}


def bandwidth(mesh: Mesh | None = None) -> float:
    """Bytes per second that the device, or a whole mesh, can read: the faster of a sum and a product with a vector.

    The median of seven times, each of several reads in a row: an accelerator dispatches the next read meanwhile, so
    dispatch does not count.
    """
    devices = 1 if mesh is None else mesh.size
    rows = devices * READ_BYTES[jax.default_backend()] // (4 * 4096)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    array = jax.jit(lambda: jnp.ones((rows, 4096), jnp.float32), out_shardings=sharding)()
    reads = 2 if jax.default_backend() == "cpu" else 8
    fastest = 0.0
    # Row by row, so that the devices of a mesh need not communicate.
    for read in (jax.jit(lambda array: array.sum(axis=1)), jax.jit(lambda array: array @ jnp.ones(4096))):

        def several(read: Callable[[jax.Array], jax.Array] = read) -> None:
            jax.block_until_ready([read(array) for _ in range(reads)])

        several()
        taken = statistics.median(seconds(several) for _ in range(7))
        fastest = max(fastest, reads * array.nbytes / taken)
    return fastest

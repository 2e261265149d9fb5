"""What the benchmarks share: the clock, the machine, the records, and the work they measure."""

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


# What is read at once to measure the bandwidth: much more than any cache holds.
READ_BYTES = {"cpu": 1 << 29, "gpu": 1 << 31, "tpu": 1 << 31}


def positive(text: str) -> int:
    """An argument of the command line that counts something there has to be."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_times(calls: dict[Any, Callable[[int], Any]], steps: int, repeats: int) -> dict[Any, list[float]]:
    """Milliseconds of a decode step, once for each repeat: what calls take for so many tokens beyond those for one.

    Args:
        calls: by what is varied; each is given a number of new tokens. They alternate, after one of each that compiles.
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
    """What a figure needs to be compared with others."""
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
    """Appends figures and the machine they are of to a file of JSON lines, if there is one."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps({**figures, **machine()}) + "\n")


def varied(shape: str) -> dict[str, Any]:
    """The config of a shape whose random weights decode to texts that differ.

    With the usual 0.02, products of narrow layers vanish beside the embedding of the last token, and every text is that
    token over and over: any two systems would agree. Here a product has a standard deviation of 1.2 at any width, which
    is enough. With much more, attention picks single columns, and rounding in bfloat16 makes other texts.
    """
    return SHAPES[shape] | {"initializer_range": 1.2 / SHAPES[shape]["hidden_size"] ** 0.5}


def random_prompts(vocab_size: int, rows: int, columns: int) -> np.ndarray:
    """int [B, P] of ids, the same at every call."""
    return np.random.default_rng(rows).integers(3, vocab_size, (rows, columns))


def continued(model: Any, prompts: np.ndarray, new_tokens: int, **kwargs: Any) -> Any:
    """What `generate` returns for prompts without padding, int [B, P], and a text without an end."""
    mask = np.ones_like(prompts)
    return jaxgen.generate(model, prompts, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, **kwargs)


def bandwidth(mesh: Mesh | None = None) -> float:
    """Bytes per second that the device, or all of a mesh, can read: the faster of sums and a product with a vector.

    Each time is of several reads in a row, so that dispatching them, which an accelerator does meanwhile, does not
    count; the median of seven.
    """
    devices = 1 if mesh is None else mesh.size
    rows = devices * READ_BYTES[jax.default_backend()] // (4 * 4096)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    array = jax.jit(lambda: jnp.ones((rows, 4096), jnp.float32), out_shardings=sharding)()
    reads = 2 if jax.default_backend() == "cpu" else 8
    fastest = 0.0
    # Row by row, so that devices have nothing to tell each other.
    for read in (jax.jit(lambda array: array.sum(axis=1)), jax.jit(lambda array: array @ jnp.ones(4096))):

        def several(read: Callable[[jax.Array], jax.Array] = read) -> None:
            jax.block_until_ready([read(array) for _ in range(reads)])

        several()
        taken = statistics.median(seconds(several) for _ in range(7))
        fastest = max(fastest, reads * array.nbytes / taken)
    return fastest

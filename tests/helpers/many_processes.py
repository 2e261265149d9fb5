"""One of several processes that run calls together, and compare them with the calls of a process alone.

    python tests/helpers/many_processes.py FOLDER ADDRESS PROCESSES PROCESS CASES

CASES is a JSON list of [data, tensor, arguments]. Every process has two devices of the CPU.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from transformers import AutoTokenizer

import jaxgen

VOCAB = 64


def main(folder: Path, address: str, processes: int, process: int, cases: list[list[Any]]) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(address, processes, process)
    alone = jaxgen.load(folder)
    models: dict[tuple[int, int, bool], Any] = {}
    for data, tensor, arguments in cases:
        across = arguments.pop("across", False)
        if (data, tensor, across) not in models:
            devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
            if across:  # the axis "tensor" runs over the processes, and "data" within each of them
                devices = np.array(jax.devices()[: data * tensor]).reshape(tensor, data).T
            mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
            models[data, tensor, across] = jaxgen.load(folder, mesh=mesh)
        started = time.monotonic()
        if arguments.pop("no key", False):
            sample_without_key(models[data, tensor, across])
            continue
        compare(alone, models[data, tensor, across], dict(arguments))
        before = jaxgen.compile_counts()
        compare(alone, models[data, tensor, across], dict(arguments))
        assert jaxgen.compile_counts() == before, (data, tensor, arguments)
        print(f"process {process}: {data} {tensor} {arguments}: {time.monotonic() - started:.1f} s", flush=True)
    jax.distributed.shutdown()


def group(model: Any) -> int:
    """A number that processes have in common if they have the same rows."""
    for index, row in enumerate(model.mesh.devices):
        if any(device.process_index == jax.process_index() for device in row):
            return index
    raise AssertionError("a process without a device of the mesh")


def prompts(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(3, 12))
    mask = np.arange(width) >= rng.integers(0, width - 1, rows)[:, None]
    return np.where(mask, rng.integers(3, VOCAB, (rows, width)), 0), mask.astype(int)


def compare(alone: Any, together: Any, arguments: dict[str, Any]) -> None:
    seed = group(together)
    ids, mask = prompts(seed, arguments.pop("rows", 1 + seed % 3))
    streamed, assisted = arguments.pop("streamed", False), arguments.pop("assisted", False)
    again, allowed = arguments.pop("again", False), arguments.pop("allowed", False)
    options = {"max_new_tokens": 6 + 5 * (seed % 2), "return_dict_in_generate": True} | arguments
    if allowed:
        options["prefix_allowed_tokens_fn"] = lambda row, tokens: [5 + row, 6 + len(tokens) % 7, 20 + seed, 30]
    if "stop_strings" in options:
        options["tokenizer"] = AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL)
    if streamed:
        tokens = options | {"return_dict_in_generate": False}
        chunks = [
            np.concatenate([*jaxgen.stream(model, ids, attention_mask=mask, **tokens)], axis=1)
            for model in (alone, together)
        ]
        np.testing.assert_array_equal(*chunks)
        return
    outputs = []
    for model in (alone, together):
        helped = {"assistant_model": model, "num_assistant_tokens": 3} if assisted and model is together else {}
        output = jaxgen.generate(model, ids, attention_mask=mask, **options, **helped)
        if again:
            longer = np.pad(mask, ((0, 0), (0, output.sequences.shape[1] - mask.shape[1])), constant_values=1)
            output = jaxgen.generate(
                model, output.sequences, attention_mask=longer, cache=output.cache, **options, **helped
            )
        outputs.append(output)
    one, other = outputs
    np.testing.assert_array_equal(one.sequences, other.sequences, err_msg=str(arguments))
    for name in one:
        if name not in ("sequences", "cache", "past_key_values"):
            equal_outputs(one[name], other[name], f"{name} {arguments}")


def sample_without_key(model: Any) -> None:
    """Processes with the same rows draw the same tokens, and others draw other tokens, in each call again."""
    calls = [
        jaxgen.generate(model, [[5, 6, 7]], max_new_tokens=20, do_sample=True, eos_token_id=None, top_k=0)
        for _ in range(2)
    ]
    assert (calls[0] != calls[1]).any()
    drawn = process_allgather(np.concatenate([*calls, [[group(model)]]], axis=1))[:, 0]
    for one in drawn:
        for other in drawn:
            assert (one[:-1] == other[:-1]).all() == (one[-1] == other[-1]), drawn


def equal_outputs(one: Any, other: Any, message: str) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=message)


if __name__ == "__main__":
    folder, address, processes, process, cases = sys.argv[1:]
    main(Path(folder), address, int(processes), int(process), json.loads(cases))

"""Processes that hold a model together: each gets the tokens it would get alone, and none of them waits in vain."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint

from jaxgen.generation.running.processes import _groups

HELPERS = Path(__file__).parent / "helpers"
SPREAD = CONFIG | {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}
SPREAD |= {"vocab_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}

# [data, tensor, arguments] over two processes with two devices each.
CALLS: list[tuple[int, int, dict[str, Any]]] = [
    (2, 2, {"synced_gpus": True}),  # rows of other widths in each process, and another `max_new_tokens`
    (1, 4, {"num_beams": 3, "output_scores": True}),
]
OUTPUTS = {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}
MORE: list[tuple[int, int, dict[str, Any]]] = [
    (2, 2, {"no key": True}),
    (1, 4, {"no key": True}),
    (2, 2, {"streamed": True}),
    (1, 4, {"do_sample": True, "key": 3, "output_attentions": True, "rows": 2}),
    (4, 1, {"do_sample": True, "key": 3}),
    (4, 1, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "rows": 3}),
    (2, 2, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "key": 5}),
    (2, 2, {"penalty_alpha": 0.6, "top_k": 3}),
    (2, 2, {"output_attentions": True, "output_hidden_states": True}),
    (2, 2, {"again": True}),
    (2, 2, {"assisted": True}),
    (2, 2, {"do_sample": True, "num_return_sequences": 3, "key": 1}),
    (2, 2, {"guidance_scale": 1.5}),
    (2, 2, {"prefill_chunk_size": 4}),
    (2, 2, {"allowed": True}),
    (2, 2, {"stop_strings": ["ab", "7"]}),
    (2, 2, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    (1, 4, {"streamed": True}),
    (1, 4, {"again": True}),
    (1, 4, {"assisted": True, "rows": 2}),
    (1, 4, {"prompt_lookup_num_tokens": 3}),
    (1, 4, {"output_logprobs": True, "rows": 2} | OUTPUTS),
    (1, 4, {"allowed": True}),
    (2, 2, {"across": True, "rows": 5}),
    (2, 2, {"across": True, "streamed": True, "rows": 4}),
    (2, 2, {"across": True, "num_beams": 2, "output_scores": True, "rows": 4}),
    (2, 2, {"across": True, "again": True, "rows": 2}),
    (1, 4, {"stop_strings": ["ab", "7"]}),
]
FAULTS = ["interrupt", "stream", "difference"]  # an odd number: rows of their own


def run(script: str, folder: Path, processes: int, cases: object, seconds: float) -> None:
    """Starts the processes. If one fails, the others are not waited for."""
    write_checkpoint(folder, SPREAD, random_tensors(SPREAD))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)]),
        "JAX_PLATFORMS": "cpu",
    }
    logs = [folder / f"{number}.log" for number in range(processes)]
    command = [sys.executable, str(HELPERS / script), str(folder), address, str(processes)]
    started = []
    for number, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(number), json.dumps(cases)]
            started.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        for process in started:
            process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in started:
            process.kill()
            process.wait()
    failed = [log.read_text()[-4000:] for log, process in zip(logs, started, strict=True) if process.returncode]
    assert not failed, "\n\n".join(failed)


def test_every_process_gets_the_tokens_that_it_would_get_alone(tmp_path: Path) -> None:
    run("many_processes.py", tmp_path, 2, CALLS, seconds=240)


def test_a_process_that_stops_a_call_ends_it_for_all_and_the_next_one_works(tmp_path: Path) -> None:
    run("interrupted_processes.py", tmp_path, 2, FAULTS, seconds=240)


@pytest.mark.sweep
def test_every_way_of_decoding_gives_the_same_tokens_over_two_processes(tmp_path: Path) -> None:
    run("many_processes.py", tmp_path, 2, MORE, seconds=900)


@pytest.mark.sweep
@pytest.mark.parametrize("data", [1, 2, 4])
def test_every_way_of_decoding_gives_the_same_tokens_over_four_processes(data: int, tmp_path: Path) -> None:
    calls = [(data, 8 // data, arguments) for _, _, arguments in CALLS + MORE]
    run("many_processes.py", tmp_path, 4, calls, seconds=1800)


@pytest.mark.sweep
@pytest.mark.parametrize("odd", [False, True], ids=["the same rows", "rows of their own"])
def test_forty_faults_at_random_moments_leave_no_process_waiting(odd: bool, tmp_path: Path) -> None:
    faults = ["interrupt"] * 20 + ["stream"] * 10 + ["streamer"] * 5 + ["processor"] * 5 + ["argument"] * 2 + ["difference"] * (2 + odd)
    run("interrupted_processes.py", tmp_path, 2, np.random.default_rng(0).permutation(faults).tolist(), seconds=900)


def mesh(axes: tuple[str, ...], processes: list[Any]) -> Any:
    """A stand-in for a mesh whose devices belong to these processes."""
    device = np.vectorize(lambda process: SimpleNamespace(process_index=process), otypes=[object])
    devices = device(np.array(processes))
    return SimpleNamespace(axis_names=axes, devices=devices, shape=dict(zip(axes, devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("axes", "processes", "groups"),
    [
        (("data", "tensor"), [[0, 0], [0, 0], [1, 1], [1, 1]], [({0}, [0, 1]), ({1}, [2, 3])]),
        (("data", "tensor"), [[0, 1], [0, 1], [2, 3], [2, 3]], [({0, 1}, [0, 1]), ({2, 3}, [2, 3])]),
        (("tensor", "data"), [[0, 1], [0, 1]], [({0}, [0]), ({1}, [1])]),
        (("tensor",), [0, 0, 1, 1], [({0, 1}, [0])]),
        (("data",), [0, 1, 0, 1], [({0}, [0, 2]), ({1}, [1, 3])]),
        (("data", "tensor"), [[0, 0], [1, 2], [0, 1]], [({0, 1, 2}, [0, 1, 2])]),
    ],
    ids=str,
)
def test_processes_that_hold_parts_of_the_same_rows_are_a_group(axes: Any, processes: Any, groups: Any) -> None:
    found = [(members, sorted(rows)) for members, rows in _groups(mesh(axes, processes))]
    assert sorted(found, key=str) == sorted(groups, key=str)

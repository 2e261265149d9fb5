"""Processes that `jax.distributed` joins start as a single one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import jaxgen
from jaxgen.generation.running.memory import memory_bytes

HELPERS = Path(__file__).parent / "helpers"


def test_each_process_generates_the_tokens_of_a_single_one(folder: Path, model: Any) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])}
    command = [sys.executable, str(HELPERS / "processes.py"), str(folder), str(port)]
    both = [
        subprocess.Popen([*command, number, "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in ("0", "1")
    ]
    answers = []
    try:
        for process in both:
            out, err = process.communicate()
            assert process.returncode == 0, err.decode()[-5000:]
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in both:
            process.kill()
    prompt, arguments = [[5, 6, 7]], {"max_new_tokens": 6}
    greedy = jaxgen.generate(model, prompt, **arguments).tolist()
    sampled = jaxgen.generate(model, prompt, **arguments, do_sample=True, key=3).tolist()
    assert answers == [[greedy, sampled] * 2] * 2


class GPU(SimpleNamespace):
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def memory_stats(self) -> dict[str, int]:
        if self.process_index != jax.process_index():
            raise RuntimeError("memory_stats is only supported for addressable devices")
        return {"bytes_limit": 60 << 30}


def test_the_memory_that_counts_is_that_of_a_device_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [GPU(process_index=0), GPU(process_index=1)]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices[1:])
    assert memory_bytes() == 60 << 30
    from jaxgen.planning.plan import plan

    planned = plan("8b", 1, 100, 100)
    assert planned.available == 60 << 30 and planned.device == "h100"

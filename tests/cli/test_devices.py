"""`--mesh` and `--distributed`: one text over the devices of one process or of several."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgen.cli.devices import first_process_speaks, mesh_of
from jaxgen.cli.main import main

SRUN = Path(__file__).parent.parent / "helpers" / "srun.py"
GENERATE = [sys.executable, "-m", "jaxgen", "generate", "--max-tokens", "20", "--file", "-"]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(
        command, input="One day, a small fox", env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_print_the_text_of_one_and_only_the_first_says_anything(one_layer: Path) -> None:
    generate = [*GENERATE, "--model", str(one_layer)]
    two = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    alone = run([*generate, "--mesh", "tensor=2"], XLA_FLAGS=two)
    together = run([sys.executable, str(SRUN), *generate, "--distributed"], SLURM_NTASKS="2")
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr + together.stderr
    assert alone.stdout.startswith("One day, a small fox") and together.stdout == alone.stdout
    assert together.stderr.count("programs ready in") == 1 and together.stderr.count("a prompt of") == 1


def test_without_other_processes_there_is_a_mesh_only_if_one_is_given() -> None:
    assert mesh_of(argparse.Namespace(mesh=None, distributed=False)) is None
    for mesh, distributed in [("data=1", False), (None, True)]:
        found = mesh_of(argparse.Namespace(mesh=mesh, distributed=distributed))
        assert found is not None and dict(found.shape) == {"data": 1, "tensor": jax.device_count()}


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("tensor=16", "--mesh tensor=16 needs 16 devices, but there are 8. Choose a smaller one."),
        ("data=2,tensor=4", "would give 2 shares of the rows to 2 processes, but they have one text between them."),
        ("1x4", "--mesh 1x4 has 4 of the 8 devices of 2 processes, and each process must bring all of its own."),
        ("4", "--mesh 4 must be numbers of devices, at least 1, such as tensor=8, data=2,tensor=4 or 2x4."),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError) as refused:
        mesh_of(argparse.Namespace(mesh=mesh, distributed=True))
    assert said in str(refused.value)


def test_without_a_job_the_ways_to_start_one_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def initialize(**arguments: Any) -> None:
        asked.append(arguments)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert main(["generate", "x", "--distributed"]) == 1
    said = capsys.readouterr().err
    assert "--distributed does not find the other processes (coordinator_address should be defined)." in said
    assert "srun" in said and "set JAX_COORDINATOR_ADDRESS" in said
    assert asked == [{"num_processes": 2, "process_id": 1}]
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    assert main(["generate", "x", "--distributed"]) == 1
    assert "JAX_PROCESS_ID=one must be a number" in capsys.readouterr().err


@pytest.mark.parametrize("process", [0, 1])
def test_standard_output_has_only_what_the_first_process_prints(
    process: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    with pytest.raises(ValueError, match="process 1 stopped"), first_process_speaks():
        print("a story")
        print("a note", file=sys.stderr)
        os.write(1, b"what Gloo prints\n")
        raise RuntimeError("process 1 stopped this call")
    printed = capfd.readouterr()
    assert printed.out == ("" if process else "a story\n")
    assert "what Gloo prints" in printed.err and ("a note" in printed.err) == (process == 0)

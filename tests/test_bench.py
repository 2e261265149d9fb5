"""The benchmarks run and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.oracle
def test_compare_prints_a_row_per_shape_and_records_it_with_machine_and_versions(tmp_path: Path) -> None:
    record = tmp_path / "figures.jsonl"
    command = [sys.executable, str(BENCH / "compare.py"), "--shape", "2-layer", "--repeats", "1", "--json", str(record)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[1].startswith("2-layer")
    figures = json.loads(record.read_text())
    assert figures["ratio"] == pytest.approx(figures["transformers_ms"] / figures["jaxgen_ms"])
    assert {"jax", "transformers", "torch"} <= figures["versions"].keys() and figures["machine"] and figures["date"]


@pytest.mark.oracle
def test_sampling_prints_what_each_way_of_choosing_costs_over_greedy(tmp_path: Path) -> None:
    record = tmp_path / "figures.jsonl"
    command = [sys.executable, str(BENCH / "sampling.py"), "--repeats", "1", "--json", str(record)]
    command += ["--vocabulary", "5000"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(figures) == 3 and all(each["way"] in ended.stdout and each["versions"] for each in figures)
    assert figures[0]["of_greedy"] == 1


@pytest.mark.oracle
def test_beams_are_compared_after_their_tokens_are(tmp_path: Path) -> None:
    record = tmp_path / "figures.jsonl"
    command = [sys.executable, str(BENCH / "beams.py"), "--shape", "2-layer", "--repeats", "1", "--json", str(record)]
    command += ["--prompt-tokens", "40", "--batch", "2", "--new-tokens", "20"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[1].split()[:2] == ["40", "2"]
    figures = json.loads(record.read_text())
    assert figures["of_greedy"] == pytest.approx(figures["step_ms"] / figures["greedy_step_ms"])
    assert figures["of_unshared_cache"] < 0.6 and figures["versions"] and figures["machine"]


@pytest.mark.oracle
def test_streaming_is_compared_with_the_call_that_nobody_watches(tmp_path: Path) -> None:
    record = tmp_path / "figures.jsonl"
    command = [sys.executable, str(BENCH / "streaming.py"), "--shape", "2-layer", "--repeats", "1"]
    ended = subprocess.run([*command, "--json", str(record)], check=True, capture_output=True, text=True)
    figures = json.loads(record.read_text())
    assert ended.stdout.splitlines()[1].startswith("2-layer")
    assert figures["ratio"] == pytest.approx(figures["streamed_ms"] / figures["plain_ms"])

"""The benchmark runs and writes what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parent.parent / "bench" / "compare.py"


@pytest.mark.oracle
def test_compare_prints_a_row_per_shape_and_records_it_with_machine_and_versions(tmp_path: Path) -> None:
    record = tmp_path / "figures.jsonl"
    command = [sys.executable, str(COMPARE), "--shape", "2-layer", "--repeats", "1", "--json", str(record)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[1].startswith("2-layer")
    figures = json.loads(record.read_text())
    assert figures["ratio"] == pytest.approx(figures["transformers_ms"] / figures["jaxgen_ms"])
    assert {"jax", "transformers", "torch"} <= figures["versions"].keys() and figures["machine"] and figures["date"]

"""The benchmarks run and write what they print."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"

pytestmark = pytest.mark.oracle


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script as its command does: what it prints, by lines, and the figures it records."""

    def run(script: str, *options: str) -> tuple[list[str], list[dict[str, Any]]]:
        record = tmp_path / "figures.jsonl"
        monkeypatch.syspath_prepend(str(BENCH))
        monkeypatch.setattr(sys, "argv", [script, "--repeats", "1", "--json", str(record), *options])
        runpy.run_path(str(BENCH / script), run_name="__main__")
        figures = [json.loads(line) for line in record.read_text().splitlines()]
        assert all({"jax", "transformers", "torch"} <= each["versions"].keys() for each in figures)
        assert all(each["machine"] and each["date"] for each in figures)
        return capsys.readouterr().out.splitlines(), figures

    return run


def test_compare_prints_a_row_per_shape(run: Any) -> None:
    printed, (figures,) = run("compare.py", "--shape", "2-layer")
    assert printed[1].startswith("2-layer")
    assert figures["ratio"] == pytest.approx(figures["transformers_ms"] / figures["jaxgen_ms"])


def test_sampling_prints_what_each_way_of_choosing_costs_over_greedy(run: Any) -> None:
    printed, figures = run("sampling.py", "--vocabulary", "5000")
    assert len(figures) == 3 and all(each["way"] in "\n".join(printed) for each in figures)
    assert figures[0]["of_greedy"] == 1


def test_beams_are_compared_after_their_tokens_are(run: Any) -> None:
    options = ["--shape", "2-layer", "--prompt-tokens", "40", "--batch", "2", "--new-tokens", "20"]
    printed, (figures,) = run("beams.py", *options)
    assert printed[1].split()[:2] == ["40", "2"]
    assert figures["of_greedy"] == pytest.approx(figures["step_ms"] / figures["greedy_step_ms"])
    assert figures["of_unshared_cache"] < 0.6


def test_streaming_is_compared_with_the_call_that_nobody_watches(run: Any) -> None:
    printed, (figures,) = run("streaming.py", "--shape", "2-layer")
    assert printed[1].startswith("2-layer")
    assert figures["ratio"] == pytest.approx(figures["streamed_ms"] / figures["plain_ms"])


@pytest.mark.sweep
def test_continuing_prints_what_a_kept_cache_chunks_and_kept_programs_save(run: Any) -> None:
    printed, figures = run("continuing.py", "--shape", "2-layer")
    assert [each["what"] for each in figures] == ["prefix", "chunks", "second process"]
    assert all(each["ratio"] == pytest.approx(each["without"] / each["with"]) for each in figures)
    assert figures[1]["with"] < figures[1]["without"] and len(printed) == 4


def test_converting_is_compared_with_copying(run: Any) -> None:
    printed, (figures,) = run("converting.py", "--layers", "1")
    assert [line.split()[0] for line in printed[1:]] == ["copy", "convert", "back"]
    assert figures["share"] == pytest.approx(figures["convert_mb_per_s"] / figures["copy_mb_per_s"])
    assert figures["memory_bytes"] < figures["largest_bytes"]

"""The benchmarks run and write what they print."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from compilers import elements, loop_body, moves

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


LOOP = """
HloModule jit__advance

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %total = f32[] add(%a, %a)
}

%fused (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %turned = f32[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %kept = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %fetch = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%kept)
  %written = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%kept)
  %small = f32[2]{0} copy(%other)
  %sum = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce(%kept, %small), to_apply=%add
  %gathered = (f32[4]{0}, f32[8]{0}) all-gather-start(%small), dimensions={0}
  ROOT %fusion = f32[8,4]{1,0} fusion(%kept), kind=kLoop, calls=%fused
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %outside = f32[4,8]{1,0} copy(%p)
  %loop = (s32[], f32[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
}
"""


def test_what_a_loop_moves_is_read_from_its_text() -> None:
    """Of weight size, in the device's own memory: not what is fetched on the chip, and not before the loop."""
    found = moves(loop_body(LOOP), 32)
    assert sorted(found) == ["copy-start f32[4,8]", "transpose f32[8,4]"]
    assert "copy f32[2]" in moves(loop_body(LOOP), 2)
    assert elements("bf16[2,3,4]") == 24 and elements("s32[]") == 1


def test_what_a_loop_sends_is_read_from_its_text() -> None:
    assert [each.sent for each in loop_body(LOOP) if each.sent] == [4 * 32 + 2 * 16, 4 * 8]


def test_a_program_without_one_loop_is_not_taken_for_a_decode() -> None:
    with pytest.raises(ValueError, match="the program has 0"):
        loop_body(LOOP.replace(" while(", " call("))


@pytest.mark.sweep
def test_a_tpu_that_is_not_there_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler: `pip install jax[tpu]` in an environment of its own."""
    pytest.importorskip("libtpu")
    import compilers

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(compilers.SHAPES, "short", compilers.SHAPES["1b"] | {"num_hidden_layers": 2})
    case = compilers.Case("v5e", "short", (1, 4), 4, 128, 128)
    figures = compilers.examine(case, compilers.devices("v5e", 4))
    assert figures["refused"] is None and figures["fits"] and figures["plan_fits"]
    assert figures["plan_ratio"] == pytest.approx(1, abs=0.25)
    assert figures["moves"] == [] and figures["collectives"] > 0

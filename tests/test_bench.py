"""The benchmarks run and write what they print."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from compilers import elements, loop_body, moves

import jaxgen

BENCH = Path(__file__).parent.parent / "bench"

pytestmark = pytest.mark.oracle


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script as its command does: what it prints, by lines, and the figures it records."""

    def run(script: str, *options: str) -> tuple[list[str], list[dict[str, Any]]]:
        record = tmp_path / "figures.jsonl"
        monkeypatch.syspath_prepend(str(BENCH))
        monkeypatch.setattr(importlib.import_module("common"), "READ_BYTES", {"cpu": 1 << 20})
        monkeypatch.setattr(sys, "argv", [script, "--repeats", "1", "--json", str(record), *options])
        runpy.run_path(str(BENCH / script), run_name="__main__")
        figures = [json.loads(line) for line in record.read_text().splitlines()]
        assert figures and all({"jax", "transformers", "torch"} <= each["versions"].keys() for each in figures)
        assert all(each["machine"] and each["date"] for each in figures)
        return capsys.readouterr().out.splitlines(), figures

    return run


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return importlib.import_module


SHORT = ("--shape", "2-layer", "--new-tokens", "8", "--batch", "2")


def test_compare_prints_a_row_per_case_and_the_ratio_of_every_peer(
    run: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here(bench("peers").Worker):
        """In this process, which saves the time for two others to start."""

        def __init__(self, name: str, folder: str, dtype: str):
            peer = bench("peers").PEERS[name](folder, dtype)
            self._ask = lambda method, case: getattr(peer, method)(case)

        def close(self) -> None: ...

    monkeypatch.setattr(bench("peers"), "Worker", Here)
    printed, (figures,) = run("compare.py", *SHORT, "--decode", "beams", "--peers", "transformers")
    assert printed[2].split()[:3] == ["2-layer", "2", "beams"] and printed[2].count("x") == 2
    assert figures["ratio"] == pytest.approx(figures["transformers_ms"] / figures["jaxgen_ms"])
    assert figures["peers"]["transformers"]["ratio"] == figures["ratio"]


@pytest.mark.sweep
def test_a_peer_answers_from_its_own_process_and_says_what_failed_there(bench: Any, folder: Path) -> None:
    peers = bench("peers")
    prompts = np.arange(3, 11).reshape(2, 4)
    worker = peers.Worker("jaxgen", str(folder), "float32")
    case = peers.Case("greedy", prompts, 4)
    assert np.array_equal(worker.first(case)[1], peers.Jaxgen(str(folder), "float32").generate(case))
    assert worker.timed(case) > 0 and worker.refuses(case) is None
    with pytest.raises(RuntimeError, match=r"ValueError: .*`input_ids`"):
        worker.first(peers.Case("greedy", -prompts, 4))
    worker.close()
    with pytest.raises(RuntimeError, match="is not a folder"):
        peers.Worker("jaxgen", str(folder / "none"), "float32")


def test_a_peer_that_gives_other_tokens_or_none_gets_no_ratio(bench: Any) -> None:
    compare, peers = bench("compare"), bench("peers")
    ours = np.arange(8).reshape(2, 4)

    class Fixed(peers.Peer):
        def __init__(self, tokens: np.ndarray):
            self.tokens = tokens

        def generate(self, case: Any) -> np.ndarray:
            return self.tokens

    class Failing(peers.Peer):
        def generate(self, case: Any) -> np.ndarray:
            raise RuntimeError("no memory")

    given = {"jaxgen": Fixed(ours), "same": Fixed(ours), "other": Fixed(ours[::-1]), "fewer": Fixed(ours[:, :3])}

    def judge(case: Any, tokens: np.ndarray) -> Any:
        return SimpleNamespace(wrong=int((tokens != ours).any()))

    class FailingLater(Fixed):
        def timed(self, case: Any) -> float:
            raise RuntimeError("no memory left")

    given["failing later"] = FailingLater(ours)
    case = peers.Case("greedy", np.ones((2, 5), int), 4)
    given |= {"failing": Failing(), "missing": peers.Missing("no such file")}
    figures = compare.compare(given, judge, case, "float32", 1)
    assert figures["same"]["ratio"] == pytest.approx(figures["same"]["ms"] / figures["jaxgen"]["ms"])
    assert figures["other"] == {"skipped": "other tokens"} and figures["failing"] == {"skipped": "no memory"}
    assert figures["missing"] == {"skipped": "no such file"}
    assert figures["failing later"] == {"skipped": "no memory left"}
    assert figures["fewer"] == {"skipped": "tokens of shape (2, 3) instead of (2, 4)"}
    assert "ratio" not in {**figures["other"], **figures["fewer"], **figures["failing"]}
    with pytest.raises(SystemExit, match="jaxgen's tokens differ from"):
        compare.compare(given | {"jaxgen": given["other"]}, judge, case, "float32", 1)


@pytest.mark.parametrize(("decode", "dtype"), [("beams", "float32"), ("beams", "bfloat16"), ("greedy", "float32")])
def test_tokens_may_differ_where_rounding_decides(bench: Any, decode: str, dtype: str) -> None:
    compare, peers = bench("compare"), bench("peers")
    ours = np.arange(8).reshape(2, 4)
    case = peers.Case(decode, np.ones((2, 5), int), 4)
    reason = compare.difference(case, ours, ours + 1, lambda case, tokens: SimpleNamespace(wrong=0), dtype)
    assert reason == ("other tokens" if (decode, dtype) == ("beams", "float32") else None)


def test_throughput_checks_the_tokens_that_it_times(run: Any) -> None:
    options = ["--model", "2-layer", "--new-tokens", "8", "--batch", "2", "--decode", "greedy", "sampling", "beams"]
    printed, figures = run("throughput.py", *options)
    assert [each["decode"] for each in figures] == [line.split()[3] for line in printed[2:]]
    for each in figures:
        assert each["reference"] == "transformers" and each["ties"] == 0
        assert each["mbu"] == pytest.approx(each["bytes_per_step"] / each["step_ms"] * 1e3 / each["bandwidth"])
        assert each["compile_s"] == pytest.approx(each["cold_s"] - each["warm_s"])


@pytest.mark.sweep
def test_throughput_of_two_processes_is_printed_and_recorded_by_the_first(tmp_path: Path) -> None:
    options = ["--model", "2-layer", "--new-tokens", "4", "--repeats", "1", "--decode", "greedy", "beams"]
    srun, record = BENCH.parent / "tests" / "helpers" / "srun.py", tmp_path / "figures.jsonl"
    command = [sys.executable, str(srun), sys.executable, str(BENCH / "throughput.py"), *options]
    done = subprocess.run(
        [*command, "--distributed", "--json", str(record)],
        env=os.environ | {"SLURM_NTASKS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(each["decode"], each["mesh"]) for each in figures] == [
        (decode, {"data": 1, "tensor": 2}) for decode in ("greedy", "beams")
    ]
    assert done.stdout.count("GB of weights") == 1


@pytest.mark.parametrize("of", ["transformers", "jaxgen"])
def test_tokens_of_other_weights_end_the_run(bench: Any, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common, reference, throughput = bench("common"), bench("reference"), bench("throughput")
    if of == "jaxgen":
        monkeypatch.setattr(reference, "_MOST_PARAMETERS", 0)
    model = jaxgen.from_config(common.varied("2-layer"))
    prompts = common.random_prompts(model.vocab_size, 2, 16)
    right = common.continued(model, prompts, 8)
    judge = reference.Reference(model)
    assert judge.of == of
    assert throughput.check(model, judge, "greedy", prompts, [right]) == 0
    perturbed = jax.tree.map(lambda weight: weight + 0.05, model)
    with pytest.raises(SystemExit, match="tokens differ from those of"):
        throughput.check(perturbed, judge, "greedy", prompts, [common.continued(perturbed, prompts, 8)])
    with pytest.raises(SystemExit, match="two calls with the same arguments gave different tokens"):
        throughput.check(model, judge, "greedy", prompts, [right, right + 1])


def test_a_step_reads_the_weights_once_and_what_is_valid_of_the_cache(bench: Any) -> None:
    throughput, shapes = bench("throughput"), bench("jaxgen.planning.shapes").SHAPES
    config = shapes["2-layer"]
    untied, tied = (jaxgen.from_config(config | {"tie_word_embeddings": tie}) for tie in (False, True))
    column = 2 * 2 * 2 * 16 * 4  # keys and values of two layers, two heads of 16, in float32
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(tied))
    assert throughput.step_bytes(tied, "greedy", 3, 32, 8) == weights + 3 * (32 + 4) * column
    assert throughput.step_bytes(untied, "beams", 3, 32, 8) == weights + 3 * (32 + 16) * column


@pytest.mark.sweep
def test_growth_prints_a_table_for_each_axis_and_the_slope_of_the_bytes(run: Any) -> None:
    options = ["--shape", "2-layer", "--length", "96", "192", "--batch", "1", "2", "--beams", "1", "2", "--steps", "4"]
    printed, figures = run("growth.py", *options)
    assert [(each["axis"], each["value"]) for each in figures] == [
        ("length", 96), ("length", 192), ("batch", 1), ("batch", 2), ("beams", 1), ("beams", 2)
    ]  # fmt: skip
    assert {each.get("room") for each in figures[:2]} == {256}
    assert figures[0]["floor_slope_ms"] == pytest.approx(512 / figures[0]["bandwidth"] * 1e3)
    assert printed[3].startswith(f"{figures[0]['slope_ms'] * 1e3:.2f} us per column")


def test_every_record_has_its_picture(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    origin = bench("common").machine()
    records = {
        "throughput": {"model": "1b", "dtype": "float32", "quantize": None, "mesh": None, "decode": "greedy"}
        | {"prompt_tokens": 32, "new_tokens": 8, "batch": 1, "step_ms": 2.0, "mbu": 0.5, "bandwidth": 1e9}
        | {"bytes_per_step": 1e6},
        "growth": {"shape": "1b", "dtype": "float32", "axis": "length", "value": 128, "step_ms": 2.0}
        | {"step_ms_range": [1.0, 3.0], "floor_slope_ms": 0.1},
        "compare": {
            "shape": "1b",
            "dtype": "float32",
            "decode": "greedy",
            "batch": 1,
            "prompt_tokens": 32,
            "new_tokens": 8,
        }
        | {"peers": {"jaxgen": {"ms": 1.0, "ratio": 1.0}, "other": {"skipped": "other tokens"}}},
    }
    arguments = ["plot.py", "--to", str(tmp_path)]
    for name, figures in records.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(figures | origin) + "\n")
        arguments += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(BENCH / "plot.py"), run_name="__main__")
    pictures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [picture.stem for picture in pictures] == [*records]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.sweep
def test_sampling_prints_what_each_way_of_choosing_costs_over_greedy(run: Any) -> None:
    printed, figures = run("sampling.py", "--vocabulary", "5000")
    assert len(figures) == 3 and all(each["way"] in "\n".join(printed) for each in figures)
    assert figures[0]["of_greedy"] == 1


@pytest.mark.sweep
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


def test_caches_in_eight_bits_are_timed_and_measured_beside_the_models_dtype(run: Any) -> None:
    options = ("--shape", "2-layer", "--batch", "2", "--columns", "16", "--steps", "2")
    lines, figures = run("quantized_cache.py", *options)
    assert len(lines) == 1 + len(figures) == 4
    plain, int8, fp8 = figures
    assert plain["kl"] == 0 < int8["kl"] < fp8["kl"]
    assert plain["cache_bytes"] > int8["cache_bytes"] > fp8["cache_bytes"]


def test_converting_is_compared_with_copying(run: Any) -> None:
    printed, (figures,) = run("converting.py", "--layers", "1")
    assert [line.split()[0] for line in printed[1:]] == ["copy", "convert", "back"]
    assert figures["share"] == pytest.approx(figures["convert_mb_per_s"] / figures["copy_mb_per_s"])
    assert figures["memory_bytes"] < figures["largest_bytes"]


def test_assisted_calls_are_timed_beside_plain_ones_with_the_same_tokens(run: Any) -> None:
    short = ("--shape", "2-layer", "--new-tokens", "12", "--num-tokens", "3")
    _, lookups = run("assisted.py", *short)
    assert [each["task"] for each in lookups] == ["copy", "no copy"]
    assert lookups[0]["accepted"] > 5
    _, figures = run("assisted.py", *short, "--assistant", "2-layer", "--right", "1")
    assert (figures[-1]["task"], figures[-1]["rounds"]) == ("100% right", 4)
    assert figures[-1]["accepted"] == figures[-1]["drafted"] == 8


def test_the_passes_whose_cycles_are_counted_run(bench: Any) -> None:
    passes = bench("verify_step").passes
    model = jaxgen.from_config(bench("verify_step").SHAPES["2-layer"])
    for columns in (1, 4):
        cache = model.make_cache(1, 16) if columns == 1 else model.make_cache(1, 16).ragged()
        _, tokens = jax.jit(passes)(model, cache, np.full((1, columns), 5), np.int32(3))
        assert tokens.shape == (1, columns)


LOOP = """
HloModule jit_advance

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %total = f32[] add(%a, %a)
}

%in_another_layout (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %read = f32[4,8]{1,0} copy(%q)
}

%fused (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  %inner = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%in_another_layout
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
  ROOT %fusion = f32[8,4]{1,0} fusion(%kept), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"350"}
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
    """Of weight size, in the device's own memory: not what is fetched on the chip, read in another layout within a
    fusion, or moved before the loop."""
    found = moves(loop_body(LOOP), 32)
    assert sorted(found) == ["copy-start f32[4,8]", "transpose f32[8,4]"]
    assert "copy f32[2]" in moves(loop_body(LOOP), 2)
    assert elements("bf16[2,3,4]") == 24 and elements("s32[]") == 1


def test_what_a_loop_sends_is_read_from_its_text() -> None:
    assert [each.sent for each in loop_body(LOOP) if each.sent] == [4 * 32 + 2 * 16, 4 * 8]


INNER = """
%ring (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %state.1 = (s32[], f32[2]{0}) parameter(0)
  %two = s32[] constant(2)
  %number = s32[] get-tuple-element(%state.1), index=0
  %part = f32[2]{0} get-tuple-element(%state.1), index=1
  %passed = (f32[2]{0}, f32[2]{0}) collective-permute-start(%part)
  %next = s32[] add(%number, %two)
  ROOT %state.2 = (s32[], f32[2]{0}) tuple(%next, %part)
}

%unfinished (state: (s32[], f32[2])) -> pred[] {
  %limit = s32[] constant(8)
  %state.3 = (s32[], f32[2]{0}) parameter(0)
  %number.1 = s32[] get-tuple-element(%state.3), index=0
  ROOT %less = pred[] compare(%number.1, %limit), direction=LT
}

%body ("""


def test_what_an_inner_loop_sends_counts_as_often_as_it_runs() -> None:
    inside = "  %small = f32[2]{0} copy(%other)\n"
    loop = "  %inner = (s32[], f32[2]{0}) while(%start), condition=%unfinished, body=%ring\n"
    text = LOOP.replace("\n%body (", INNER).replace(inside, inside + loop)
    sent = [each.sent for each in loop_body(text) if each.operation == "collective-permute-start"]
    assert sent == [8] * 4  # from 0 to 8 by twos
    unknown = [each.sent for each in loop_body(text.replace("constant(8)", "parameter(1)")) if each.sent == 8]
    assert unknown == [8]


def test_the_cycles_that_a_compiler_expects_are_read_from_the_text() -> None:
    assert [(each.operation, each.cycles) for each in loop_body(LOOP) if each.cycles] == [("fusion", 350)]


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
    # A layer of the cache that was kept on the chip is written back; no weight is moved.
    assert all(each.startswith("copy-start ") and each.endswith("[4,2,256,64]") for each in figures["moves"])
    assert figures["collectives"] > 0


@pytest.mark.sweep
def test_tpus_that_share_a_key_value_head_exchange_little_and_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler, which would share out the heads in another way; see `Attention`."""
    pytest.importorskip("libtpu")
    import compilers

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(compilers.SHAPES, "short", compilers.SHAPES["405b"] | {"num_hidden_layers": 1})
    case = compilers.Case("v5p", "short", (1, 16), 16, 512, 512)
    figures = compilers.examine(case, compilers.devices("v5p", 16))
    assert 0 < figures["collective_bytes"] < figures["cache_bytes"] / 2
    assert figures["collectives"] < 16


@pytest.mark.sweep
def test_the_run_for_a_gpu_can_be_rehearsed_without_one(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    options = "--shape 2-layer --steps 2 --columns 32 --slots 64".split()
    monkeypatch.setattr(sys, "argv", ["gpu_decode_step.py", str(tmp_path), *options])
    runpy.run_path(str(BENCH / "gpu_decode_step.py"), run_name="__main__")
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    kinds = {"machine", "attention of a prompt", "step", "call", "call of transformers"}
    assert {each["what"] for each in figures} == kinds
    steps = [each for each in figures if each["what"] == "step"]
    exact = [each for each in steps if each["weights"] == "bfloat16" and "cache" not in each["options"]]
    assert all(each["same_tokens"] == 1 for each in exact)
    assert {each["options"] for each in steps} >= {"cache in int8", "cache in fp8"}

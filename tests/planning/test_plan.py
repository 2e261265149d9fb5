"""A plan's numbers are those of the programs, and what it suggests does fit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint

import jaxgen
from jaxgen.checkpoint.load import _random_shardings, abstract
from jaxgen.checkpoint.source import parse_config
from jaxgen.cli.main import main
from jaxgen.decoding import loop
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.request import Request
from jaxgen.planning.plan import DEVICE_NAMES, Plan, plan
from jaxgen.planning.shapes import SHAPES

CALLS: list[dict[str, Any]] = [
    {},
    {"batch": 5},
    {"batch": 2, "num_beams": 3},
    {"batch": 3, "num_return_sequences": 2},
    {"dtype": "bfloat16", "prompt_tokens": 17, "new_tokens": 5},
]


def programs(
    shape: str, batch: int, prompt_tokens: int, new_tokens: int, dtype: str = "float32", **options: Any
) -> Any:
    """The model and the arguments of its programs, as shapes; and the state between them."""
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), abstract(SHAPES[shape]))
    calls = []

    def lowered(model: Any) -> None:
        if options.get("num_return_sequences", 1) > 1:
            options["do_sample"], options["key"] = True, 0
        key = options.pop("key", None)
        keywords = {"max_new_tokens": new_tokens, **options}
        request = Request(inputs=np.ones((batch, prompt_tokens), int), key=key, keywords=keywords)
        calls.append(build_call(model, request, *read_request(model, request)).call)

    jax.eval_shape(lowered, model)
    call = calls[0]
    prefill = loop.prefill.lower(model, call, ())
    return model, call, prefill, prefill.out_info[0]


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("changes", CALLS, ids=str)
def test_weights_and_cache_are_those_of_the_programs_to_the_byte(changes: dict[str, Any]) -> None:
    call = {"batch": 1, "prompt_tokens": 20, "new_tokens": 30} | changes
    model, _, _, state = programs("2-layer", **call)
    found = plan("2-layer", **call)
    assert (found.weights, found.cache) == (size(model), size(state.cache.layers))
    assert found.slots == state.cache.slots
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 4, "prompt_tokens": 256},  # scores are what counts
        {"batch": 32, "prompt_tokens": 32},  # units of the MLP are
        {"batch": 2, "prompt_tokens": 1024},  # units again, since the scores are those of some columns at a time
        {"batch": 4, "prompt_tokens": 128, "num_beams": 4},
        {"batch": 4, "prompt_tokens": 256, "dtype": "bfloat16"},  # whose weights XLA:CPU widens
    ],
    ids=str,
)
def test_the_whole_is_what_the_compiler_says_within_15_percent(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "wide", SHAPES["135m"] | {"num_hidden_layers": 2, "vocab_size": 2000})
    call = {"new_tokens": 32} | changes
    model, lowered, prefill, state = programs("wide", **call)
    advance = loop.advance.lower(model, state, lowered.strategy, np.int32(1), ())
    memory = [program.compile().memory_analysis() for program in (prefill, advance)]
    compiled = max(
        each.argument_size_in_bytes + each.output_size_in_bytes - each.alias_size_in_bytes + each.temp_size_in_bytes
        for each in memory
    )
    found = plan("wide", **call)
    assert found.total == pytest.approx(compiled, rel=0.15)
    assert found.total - found.weights - found.cache > 0.1 * found.total, "temporaries must count here"


def recorded() -> list[Any]:
    """What the compilers of TPUs and GPUs said, by `bench/compilers.py`: the newest row of each case."""
    rows = {}
    for file in sorted((Path(__file__).parents[2] / "bench" / "results").glob("*-compilers.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            sizes = (row["batch"], row["prompt_tokens"], row["new_tokens"])
            options = {"mesh": tuple(row["mesh"]), "num_beams": row["num_beams"]}
            options |= {name: row.get(name) for name in ("quantize", "cache_backend")}
            rows[row["target"], row["shape"], sizes, *options.values()] = (
                row["total_bytes"] if not row["refused"] else None
            )
    return [pytest.param(*case, total, id=" ".join(map(str, case))) for case, total in rows.items() if total]


@pytest.mark.parametrize(
    ("device", "shape", "sizes", "mesh", "num_beams", "quantize", "cache_backend", "total"), recorded()
)
def test_the_whole_on_accelerators_is_what_their_compilers_said_within_10_percent(
    device: str,
    shape: str,
    sizes: tuple[int, int, int],
    mesh: tuple[int, int],
    num_beams: int,
    quantize: str | None,
    cache_backend: str | None,
    total: int,
) -> None:
    options: dict[str, Any] = {"num_beams": num_beams, "dtype": "bfloat16", "quantize": quantize}
    options |= {"cache_backend": cache_backend}
    assert plan(shape, *sizes, device=device, mesh=mesh, **options).total == pytest.approx(total, rel=0.1)


def test_each_device_of_a_mesh_has_its_share() -> None:
    one, eight = plan("8b", 16, device="v5p"), plan("8b", 16, device="v5p", mesh=(1, 8))
    assert eight.cache * 8 == one.cache
    norms = (2 * 32 + 1) * 4096 * 2
    assert (eight.weights - norms) * 8 == one.weights - norms
    spread = plan("8b", 17, device="v5p", mesh=(4, 2))
    assert spread.rows == 4 * 6, "each of four devices has a bucket of rows"


def test_a_cache_in_eight_bits_is_counted_with_its_scales() -> None:
    wide, int8, fp8 = (
        plan("8b", 64, device="h200", dtype="bfloat16", cache_backend=each) for each in (None, "int8", "fp8")
    )
    columns = wide.rows * wide.slots
    assert wide.cache == columns * 2 * 32 * 8 * 128 * 2
    # A byte for each number and four for each column of a head, and one that says whether the column counts.
    assert int8.cache == columns * (2 * 32 * 8 * (128 + 4) + 1)
    assert fp8.cache == columns * (2 * 32 * 8 * 128 + 1)
    assert int8.cache_backend == "int8" and int8.step_ms < wide.step_ms
    with pytest.raises(ValueError, match=r"`cache_backend`='int2' must be one of \['int8', 'fp8'\]"):
        plan("8b", cache_backend="int2")


def test_int8_is_a_byte_per_weight_a_scale_per_row_and_a_few_columns_in_full() -> None:
    found = plan("2-layer", quantize="int8", device="l4")
    model = jax.eval_shape(lambda: jaxgen.from_config(SHAPES["2-layer"], quantize="int8"))
    assert found.weights == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    matrices = 2 * 1000 * 64 + 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
    rows = 2 * 1000 + 2 * (128 + 64 + 256 + 64)
    of_128_columns = 2 * 64
    outliers = 4 * (2 * rows + 2 * of_128_columns) + 4 * (2 * 2 + 2 * (2 + 2 + 2 + 4))
    assert found.weights == matrices + 4 * rows + outliers + 4 * 5 * 64


@pytest.mark.parametrize("tensor", [1, 2])
def test_int4_is_counted_as_each_device_of_a_mesh_holds_it(tensor: int) -> None:
    found = plan("2-layer", quantize="int4", device="l4", mesh=(1, tensor))
    mesh = jax.sharding.AbstractMesh((tensor,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    config, (family, parsed, _) = SHAPES["2-layer"], parse_config(SHAPES["2-layer"], None)
    model = jax.eval_shape(lambda: jaxgen.from_config(config, quantize="int4"))
    shards = _random_shardings(family, parsed, np.dtype("float32"), "int4", mesh)
    sizes = [
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(model), jax.tree.leaves(shards), strict=True)
    ]
    assert found.weights == sum(sizes)


def test_a_step_takes_at_least_as_long_as_its_reads() -> None:
    found = plan("8b", 16, 1024, 256, device="h200")
    embedding = 128256 * 4096 * 2
    read = found.weights - embedding + 16 * 1280 * 2 * 32 * 8 * 128 * 2
    assert found.step_ms == pytest.approx(1e3 * read / 4800e9)
    assert found.tokens_per_s == pytest.approx(16e3 / found.step_ms)
    tied = plan("1b", 1, 16, 1, device="h200")
    assert tied.step_ms == pytest.approx(1e3 * (tied.weights + 17 * 2 * 16 * 8 * 64 * 2) / 4800e9)


def test_gpus_are_planned_with_the_share_that_jax_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    usual = plan("1b", device="h100").available
    for name in names:
        with monkeypatch.context() as environment:
            environment.setenv(name, "0.9")
            assert plan("1b", device="h100").available == pytest.approx(usual * 0.9 / 0.75)
            for wrong in ("most", "0", "nan"):
                environment.setenv(name, wrong)
                with pytest.raises(ValueError, match=rf"\${name}='{wrong}' must be a number above 0"):
                    plan("1b", device="h100")


def test_the_command_says_which_part_of_a_gpu_jax_takes_and_how_to_change_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert main(["plan", "8b", "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert "of 112.6 GB: fits" in said
    assert "JAX takes 75% of the 150.1 GB that the device has; XLA_CLIENT_MEM_FRACTION=0.9 in the env" in said
    for device in ("v5p", "v6e"):
        assert main(["plan", "8b", "--device", device]) == 0
        assert "JAX takes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompt", "new", "said"), [(1, 1, "1 x 1 + 1 token: 1 row, "), (1000, 2000, "1 x 1,000 + 2,000 tokens: 1 row, ")]
)
def test_the_command_counts_in_english(prompt: int, new: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "2-layer", "--prompt-tokens", str(prompt), "--new-tokens", str(new), "--device", "v5e"]) == 0
    assert said in capsys.readouterr().out


def again(given: Plan, **changes: Any) -> Plan:
    """The plan for what a suggestion says, made anew."""
    names = ("num_beams", "num_return_sequences", "dtype", "quantize", "device", "mesh")
    options = {name: getattr(given, name) for name in names} | changes
    return plan(given.model, given.batch, given.prompt_tokens, given.new_tokens, **options)


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ("8b", {"batch": 16, "device": "v5e"}),
        ("70b", {"batch": 4, "device": "h100", "num_beams": 4}),
        ("405b", {"batch": 16, "device": "v5e"}),
    ],
)
def test_what_is_suggested_fits_when_it_is_planned(shape: str, call: dict[str, Any]) -> None:
    found = plan(shape, **call)
    assert not found.fits and found.suggestions
    for each in found.suggestions:
        assert each.fits and again(each) == each


def test_each_kind_of_change_is_suggested_once_and_the_smallest() -> None:
    found = plan("8b", 16, 256, 256, device="v5e")
    changes = [(each.batch, each.quantize, each.mesh, each.device) for each in found.suggestions]
    assert (16, "int8", (1, 1), "v5e") in changes
    assert (16, None, (1, 2), "v5e") in changes
    assert len(changes) == len(set(changes)) <= 4
    assert all(
        sum(one != other for one, other in zip(each, (16, None, (1, 1), "v5e"), strict=True)) == 1 for each in changes
    )
    (fewer,) = [each.batch for each in found.suggestions if each.batch != 16]
    assert not plan("8b", fewer + 1, 256, 256, device="v5e").fits


def test_several_changes_are_suggested_only_if_none_is_enough() -> None:
    found, asked = plan("405b", 4096, device="v5e"), (4096, None, (1, 1), "v5e")
    suggested = [(each.batch, each.quantize, each.mesh, each.device) for each in found.suggestions]
    assert (48, None, (2, 128), "v5e") in suggested
    assert all(sum(one != other for one, other in zip(each, asked, strict=True)) == 2 for each in suggested)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "`batch`=0 must be a positive integer"),
        ({"prompt_tokens": -1}, "`prompt_tokens`=-1 must be"),
        ({"new_tokens": 2.5}, r"`new_tokens`=2.5 must be"),
        ({"num_beams": 0}, "`num_beams`=0 must be"),
        ({"device": "v7"}, r"`device`='v7' is not known; it may be one of \['v5e'"),
        ({"quantize": "int2"}, "`quantize`='int2' is not supported"),
        ({"dtype": "int8"}, "`dtype`='int8' is not supported"),
        ({"mesh": (0, 1)}, r"`mesh`=\(0, 1\) must be two positive integers"),
        ({"mesh": (1, 7)}, "`intermediate_size`=[0-9]+ cannot be spread over the 7 devices"),
        ({"num_beams": 2, "num_return_sequences": 3}, "`num_return_sequences`"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("2-layer", **arguments)


def test_a_folder_is_planned_as_it_will_be_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    model = jaxgen.load(tmp_path)
    found = plan(tmp_path, 2, 20, 10)
    assert (found.weights, found.dtype) == (size(model), str(model.dtype))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_the_command_says_whether_it_fits_and_ends_accordingly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8b", "--device", "v6e", "--batch", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("model       8b, 8,030,261,248 parameters in bfloat16")
    assert "of 33.6 GB: fits" in said and "tokens/s" in said and "would fit" not in said
    assert main(["plan", "8b", "--device", "v5e", "--batch", "16"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "would fit   --quantize int8" in said and "would fit   --mesh 1x2" in said


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8b", "--device", "v5e", "--batch", "16", "--mesh", "1x1", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    found = plan("8b", 16, device="v5e")
    assert (printed["total"], printed["fits"]) == (found.total, False)
    assert [each["total"] for each in printed["suggestions"]] == [each.total for each in found.suggestions]


@pytest.mark.parametrize("mesh", ["8", "1x", "axb", "1x2x3", "0x1", "tensor=", "pipe=2", "data=2,data=2"])
def test_a_mesh_is_numbers_of_devices(mesh: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8b", "--mesh", mesh]) == 1
    assert (
        f"--mesh {mesh} must be numbers of devices, at least 1, such as tensor=8, data=2,tensor=4 or 2x4"
        in capsys.readouterr().err
    )


def test_the_help_names_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in DEVICE_NAMES)


def assisted_programs(model: Any, assistant: Any, batch: int, prompt_tokens: int, new_tokens: int, slots: int) -> Any:
    """The programs of a call with drafts of 3 tokens, lowered, and the state between them."""
    calls: list[Any] = []

    def build(model: Any, assistant: Any) -> None:
        keywords = {"max_new_tokens": new_tokens, "num_assistant_tokens": 3}
        request = Request(inputs=np.ones((batch, prompt_tokens), int), assistant_model=assistant, keywords=keywords)
        calls.append(build_call(model, request, *read_request(model, request)).call)

    jax.eval_shape(build, model, assistant)
    strategy = replace(calls[0].strategy, drafter=replace(calls[0].strategy.drafter, model=assistant))
    prefill = loop.prefill.lower(model, replace(calls[0], strategy=strategy), (), slots)
    state = prefill.out_info[0]
    return prefill, loop.advance.lower(model, state, strategy, np.int32(1), ()), state


def test_an_assistant_counts_with_its_weights_and_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache has some slots more, for its first draft."""
    monkeypatch.setitem(SHAPES, "wide", SHAPES["135m"] | {"num_hidden_layers": 2, "vocab_size": 20000})
    monkeypatch.setitem(SHAPES, "narrow", SHAPES["wide"] | {"num_hidden_layers": 1})
    call = {"batch": 16, "prompt_tokens": 32, "new_tokens": 32}
    found = plan("wide", **call, assistant_model="narrow", num_assistant_tokens=3)
    model, assistant = abstract(SHAPES["wide"]), abstract(SHAPES["narrow"])
    prefill, advance, state = assisted_programs(model, assistant, **call, slots=found.slots)
    assert (found.weights, found.assistant_weights) == (size(model), size(assistant))
    assert found.cache == size(state.cache.layers)
    assert found.assistant_cache == pytest.approx(size(state.inner.memory.cache.layers), rel=0.05)
    memory = [program.compile().memory_analysis() for program in (prefill, advance)]
    held = found.weights + found.cache + found.assistant_weights + found.assistant_cache
    compiled = max(
        each.argument_size_in_bytes + each.output_size_in_bytes - each.alias_size_in_bytes + each.temp_size_in_bytes
        for each in memory
    )
    assert found.total - held == pytest.approx(compiled - held, rel=0.15), "temporaries"
    assert found.step_ms is None


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_copy_counts_as_an_assistant_of_its_size(kind: str) -> None:
    drafts = plan("2-layer", device="l4", assistant_model=kind)
    assert drafts.assistant_weights == plan("2-layer", quantize=kind, device="l4").weights
    assert drafts.assistant_cache == drafts.cache


def test_what_an_assistant_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`assistant_model` is for greedy decoding and sampling.*`num_beams`=2"):
        plan("2-layer", assistant_model="2-layer", num_beams=2, device="l4")
    with pytest.raises(ValueError, match="`num_assistant_tokens`=0 must be a positive integer"):
        plan("2-layer", assistant_model="2-layer", num_assistant_tokens=0, device="l4")
    with pytest.raises(ValueError, match="`num_assistant_tokens`=3 has no effect without `assistant_model`"):
        plan("2-layer", num_assistant_tokens=3, device="l4")
    with pytest.raises(ValueError, match="`num_assistant_tokens`=65 must be from 1 to 64"):
        plan("2-layer", assistant_model="2-layer", num_assistant_tokens=65, device="l4")
    with pytest.raises(ValueError, match="drafts for a model in full"):
        plan("2-layer", assistant_model="int8", quantize="int8", device="l4")


def test_the_command_plans_an_assistant_and_its_suggestions_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "70b", "--assistant", "8b", "--num-assistant-tokens", "3", "--device", "h200"]
    assert main([*arguments, "--mesh", "1x2"]) == 0
    said = capsys.readouterr().out
    assert "assistant   8b, 8.0 GB of weights and" in said
    assert "how many drafted tokens are right" in said
    assert main([*arguments, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["assistant_weights"] > 16e9
    assert all(each["assistant_weights"] for each in record["suggestions"])
    in_int8 = plan("8b", 4, device="v5e", assistant_model="int8")
    assert in_int8.suggestions and not any(each.quantize for each in in_int8.suggestions)


SEVERAL_STACKS: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5",
        "vocab_size": 2000,
        "d_model": 512,
        "d_kv": 64,
        "num_heads": 8,
        "d_ff": 1024,
        "num_layers": 2,
        "num_decoder_layers": 3,
    },
    "bart": {
        "model_type": "bart",
        "vocab_size": 2000,
        "d_model": 512,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 1024,
        "decoder_ffn_dim": 1024,
        "max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("t5", {"batch": 2, "prompt_tokens": 100, "num_beams": 3}),
        ("bart", {"batch": 3, "prompt_tokens": 40, "num_return_sequences": 2}),
    ],
    ids=str,
)
def test_an_encoder_is_counted_with_what_the_decoder_keeps_of_its_source(
    shape: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, shape, SEVERAL_STACKS[shape])
    call = {"new_tokens": 32} | changes
    model, lowered, prefill, state = programs(shape, **call, decoder_start_token_id=0)
    found = plan(shape, **call)
    assert (found.weights, found.cache) == (size(model), size(state.cache.layers))
    assert found.source == size(state.cache.memory.layers), "which beams and samples share"
    advance = loop.advance.lower(model, state, lowered.strategy, np.int32(1), ())
    memory = [program.compile().memory_analysis() for program in (prefill, advance)]
    compiled = max(
        each.argument_size_in_bytes + each.output_size_in_bytes - each.alias_size_in_bytes + each.temp_size_in_bytes
        for each in memory
    )
    assert found.total == pytest.approx(compiled, rel=0.15)


def test_a_step_reads_neither_the_encoder_nor_the_weights_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "t5", SEVERAL_STACKS["t5"])
    found = plan("t5", 4, 100, 30, device="h200")
    inner = 512  # of 8 heads of 64
    layer = 512 * inner  # each of q, k, v, o
    encoder = 2 * (4 * layer + 2 * 512 * 1024 + 2 * 512) + 32 * 8 + 512
    keys_and_values = 3 * 2 * layer
    read = found.weights - 4 * (encoder + keys_and_values) + 4 * (31 + 100) * 2 * 3 * inner * 4
    assert found.step_ms == pytest.approx(1e3 * read / 4800e9)


def test_int8_leaves_matrices_of_one_row_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SEVERAL_STACKS["bart"] | {"vocab_size": 300}
    monkeypatch.setitem(SHAPES, "bart", config)
    found = plan("bart", quantize="int8", device="l4")
    model = jax.eval_shape(lambda: jaxgen.from_config(config, quantize="int8"))
    assert found.weights == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def test_texts_and_sources_beyond_a_table_of_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "bart", SEVERAL_STACKS["bart"])
    for name, call in (("prompt_tokens", {"prompt_tokens": 1025}), ("new_tokens", {"new_tokens": 1025})):
        with pytest.raises(ValueError, match=f"`{name}`=1025 is more than the 1024 positions.*Pass at most 1024"):
            plan("bart", **call, device="l4")


def test_an_assistant_with_an_encoder_keeps_a_source_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in SEVERAL_STACKS.items():
        monkeypatch.setitem(SHAPES, name, config)
    found = plan("t5", 2, 100, 30, device="l4", assistant_model="bart", num_assistant_tokens=3)
    assert found.assistant_cache == found.source + found.cache, "both decoders have the same heads and layers"
    with pytest.raises(ValueError, match="bart has an encoder and 2-layer has none"):
        plan("2-layer", assistant_model="bart", device="l4")

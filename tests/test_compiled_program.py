"""What XLA makes of the decode loop, read from its text: the reason why a step costs what it should."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import elements, loop_body
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgen
from jaxgen.decoding import loop

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
}


def loop_instructions(text: str) -> list[tuple[str, str]]:
    """(operation, result shape) of everything the body of the program's loop runs, fusions included."""
    return [(each.operation, each.arrays[0][0]) for each in loop_body(text) if each.arrays]


@pytest.fixture(scope="module", params=[1, 4], ids=lambda rows: f"{rows} rows")
def instructions(request: pytest.FixtureRequest) -> tuple[int, list[tuple[str, str]]]:
    model = jaxgen.from_config(CONFIG)
    call = jaxgen.prepare(model, np.ones((request.param, 20), int), max_new_tokens=200)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    compiled = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile()
    return request.param * KV_HEADS * call.slots * HEAD_DIM, loop_instructions(compiled.as_text())


def test_the_loop_runs_one_forward_pass_per_step(instructions: tuple[int, list[tuple[str, str]]]) -> None:
    operations = Counter(operation for operation, _ in instructions[1])
    group = CONFIG["num_attention_heads"] // KV_HEADS
    products_per_layer = 4 + 2 * group  # qkv, output, gate and up, down; scores and weighted values of a group's heads
    assert operations["dot"] + operations["custom-call"] == LAYERS * products_per_layer + 1


def test_the_loop_moves_nothing_of_the_size_of_a_cache_layer(instructions: tuple[int, list[tuple[str, str]]]) -> None:
    cache_elements, found = instructions
    moved = [
        (operation, shape)
        for operation, shape in found
        if operation in ("copy", "transpose", "concatenate", "gather", "pad", "scatter", "select")
        and elements(shape) >= cache_elements
    ]
    assert moved == []


def test_each_layer_writes_its_keys_and_values_in_place(instructions: tuple[int, list[tuple[str, str]]]) -> None:
    cache_elements, found = instructions
    writes = [shape for operation, shape in found if operation == "dynamic-update-slice"]
    assert sum(elements(shape) == cache_elements for shape in writes) == 2 * LAYERS


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_drafts_copy_no_cache(drafts: str, rows: int) -> None:
    """Nor the assistant's, which has other sizes. Branches of a conditional would be copied into and out of."""
    model, small = jaxgen.from_config(CONFIG), jaxgen.from_config({**CONFIG, "num_key_value_heads": 4})
    asked = {"prompt_lookup_num_tokens": 11} if drafts == "lookup" else {"assistant_model": small}
    call = jaxgen.prepare(model, np.ones((rows, 20), int), max_new_tokens=200, **asked)
    state = jax.eval_shape(lambda: loop._prefill(model, call, cache_slots=256))
    text = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile().as_text()
    copied = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text)
    assert [shape for shape in copied if elements(shape) >= rows * KV_HEADS * 256 * HEAD_DIM] == []
    assert "while(" in text


@pytest.fixture(scope="module", params=[1, 3], ids=lambda rows: f"{rows} prompts")
def of_beams(request: pytest.FixtureRequest) -> tuple[int, int, list[tuple[str, str]]]:
    """Elements of a layer of the whole cache, of its prompts alone, and what the loop of four beams runs."""
    model = jaxgen.from_config(CONFIG)
    call = jaxgen.prepare(model, np.ones((request.param, 256), int), max_new_tokens=24, num_beams=4)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    compiled = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile()
    slot = request.param * KV_HEADS * HEAD_DIM
    slots = call.strategy.cache_slots(256, call.slots - 256)
    return slot * slots, slot * 256, loop_instructions(compiled.as_text())


def test_beams_move_nothing_of_the_size_of_their_prompts_cache(of_beams: tuple[int, int, Any]) -> None:
    _, prompt_elements, found = of_beams
    moving = ("copy", "transpose", "concatenate", "gather", "pad", "scatter", "select")
    assert [each for each in found if each[0] in moving and elements(each[1]) >= prompt_elements] == []


def test_beams_are_one_forward_pass_that_writes_in_place(of_beams: tuple[int, int, Any]) -> None:
    cache_elements, _, found = of_beams
    operations = Counter(operation for operation, _ in found)
    products_per_layer = 4 + 2  # the heads and beams of a group are more rows than are multiplied one by one
    selections = 3  # of candidates, of the beams that go on, and of finished ones: custom calls as well
    assert operations["dot"] + operations["custom-call"] == LAYERS * products_per_layer + 1 + selections
    writes = [shape for operation, shape in found if operation == "dynamic-update-slice"]
    assert sum(elements(shape) == cache_elements for shape in writes) == 2 * LAYERS


def test_beams_move_no_cache_on_a_tpu_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler, which needs no TPU: `pip install jax[tpu]` in an environment of its own."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=place), tree)

    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    model = jaxgen.from_config({**CONFIG, "hidden_size": 512, **heads})
    call = jaxgen.prepare(model, np.ones((4, 512), int), max_new_tokens=64, num_beams=4)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    arguments = placed(model), placed(state), placed(call.strategy), placed(np.int32(1)), ()
    program = jax.jit(loop._advance, static_argnums=4, donate_argnums=1).lower(*arguments).compile()
    found = loop_instructions(program.as_text())
    moving = ("copy", "copy-start", "transpose", "concatenate", "gather", "pad", "scatter", "select")
    prompt_elements = 4 * 4 * 512 * 128
    assert [each for each in found if each[0] in moving and elements(each[1]) >= prompt_elements] == []
    cache = sum(each.size * each.dtype.itemsize for layer in state.cache.layers for each in layer)
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * cache

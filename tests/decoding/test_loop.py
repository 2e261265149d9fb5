"""The decode loop, with a transition table in the place of a Llama."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass
from random_calls import small_model

import jaxgen
from jaxgen.decoding import loop
from jaxgen.kv_cache import KVCache

EOS, PAD = 7, 9


@register_dataclass
@dataclass(frozen=True)
class CountingCache:
    """Counts forward passes and remembers how many slots it was given."""

    passes: jax.Array
    slots: jax.Array

    @property
    def branches(self) -> int:
        return 1

    def reserve(self, slots: int) -> "CountingCache":
        del slots
        return self

    def grow(self, slots: int) -> "CountingCache":
        return replace(self, slots=jnp.int32(slots))

    def take(self, rows: jax.Array) -> "CountingCache":
        return self


@register_dataclass
@dataclass(frozen=True)
class TransitionTable:
    """A model whose next token depends on the last token only.

    Attributes:
        scores: float32 [V, V].
    """

    scores: jax.Array
    mesh: ClassVar[None] = None

    def make_cache(self, rows: int, slots: int) -> CountingCache:
        del rows
        return CountingCache(jnp.int32(0), jnp.int32(slots))

    def extend(self, cache: CountingCache, input_ids: jax.Array, *_: Any) -> Any:
        return self.scores[input_ids[:, -1]], replace(cache, passes=cache.passes + 1), {}


def table(next_tokens: dict[int, int]) -> TransitionTable:
    scores = np.zeros((10, 10), np.float32)
    for token, following in next_tokens.items():
        scores[token, following] = 1
    return TransitionTable(jnp.asarray(scores))


COUNT_UP = table({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: EOS, EOS: 8, 8: 0})


def greedy(max_length: int, eos: int = EOS) -> jaxgen.Sample:
    return jaxgen.Sample(jaxgen.EosToken(jnp.array([eos, -1])), jaxgen.MaxLength(jnp.int32(max_length)), jnp.int32(PAD))


def prompt(last_tokens: list[int], bucket_rows: int = 0) -> jaxgen.Prompt:
    ids = jnp.array([[0, 0, token] for token in [*last_tokens, *[0] * bucket_rows]])
    return jaxgen.Prompt(ids, ids >= 0, jnp.int32(1), jnp.int32(len(last_tokens)))


def sequences(outputs: Any) -> list[list[int]]:
    return outputs["sequences"][:, : outputs["length"]].tolist()


def test_each_row_follows_the_table_until_the_maximum_length() -> None:
    assert sequences(jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([0, 2]), greedy(4), 8))) == [[0, 1, 2, 3], [2, 3, 4, 5]]


def test_the_prompt_starts_in_column_zero_and_bucket_columns_never_show() -> None:
    ids = jnp.array([[9, 9, 4, 5]])
    two_columns = jaxgen.Prompt(ids, ids < 9, jnp.int32(2), jnp.int32(1))
    assert sequences(jaxgen.decode(COUNT_UP, jaxgen.Call(two_columns, greedy(4, eos=-1), 8))) == [[4, 5, 6, 7]]


def test_a_finished_row_receives_padding_until_the_last_row_is_done() -> None:
    assert sequences(jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([5, 3]), greedy(20), 24))) == [
        [5, 6, EOS, PAD, PAD],
        [3, 4, 5, 6, EOS],
    ]


def test_the_loop_ends_with_the_last_row_and_runs_no_forward_pass_too_many() -> None:
    strategy = greedy(20)
    state = loop._prefill(COUNT_UP, jaxgen.Call(prompt([5, 3]), strategy, 24))
    state = loop._advance(COUNT_UP, state, strategy, jnp.int32(24))
    assert int(state.cache.passes) == 4  # the row that starts at 3 needs four tokens: 4, 5, 6 and the end


def test_rows_of_the_batch_bucket_do_not_keep_the_loop_running() -> None:
    strategy = greedy(20)
    state = loop._prefill(COUNT_UP, jaxgen.Call(prompt([6], bucket_rows=3), strategy, 24))
    assert not strategy.unfinished(state.inner)


def test_the_first_of_equally_likely_tokens_wins() -> None:
    assert sequences(jaxgen.decode(table({}), jaxgen.Call(prompt([3]), greedy(3), 8))) == [[3, 0, 0]]


def test_chunks_of_any_size_give_the_tokens_of_one_run() -> None:
    strategy = greedy(12, eos=-1)
    state, progress = loop.prefill(COUNT_UP, jaxgen.Call(prompt([0, 4]), strategy, 16))
    assert progress.length == 2
    for steps in (1, 3, 2, 50):
        state, progress = loop.advance(COUNT_UP, state, strategy, jnp.int32(steps))
    whole = jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([0, 4]), strategy, 16))
    assert sequences(loop.finalize(strategy, state)) == sequences(whole)


def test_decode_composes_with_the_callers_jit_and_vmap() -> None:
    tables = jax.tree.map(lambda *leaves: jnp.stack(leaves), COUNT_UP, table({0: 5, 5: 0}))
    decode = jax.jit(
        jax.vmap(lambda model: jaxgen.decode(model, jaxgen.Call(prompt([0]), greedy(4), 8))["sequences"][0, :4])
    )
    assert decode(tables).tolist() == [[0, 1, 2, 3], [0, 5, 0, 5]]


@pytest.mark.parametrize("eos", [[EOS], [EOS, 2], [2, EOS, 5]])
def test_any_of_several_eos_ids_ends_a_row(eos: list[int]) -> None:
    strategy = replace(greedy(20), eos=jaxgen.EosToken(jnp.array(eos)))
    row = sequences(jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([0]), strategy, 24)))[0]
    assert row == list(range(min(eos) + 1))


def test_a_row_that_meets_nan_is_flagged_and_the_others_go_on() -> None:
    broken = replace(COUNT_UP, scores=COUNT_UP.scores.at[4].set(jnp.nan))
    outputs = jaxgen.decode(broken, jaxgen.Call(prompt([0, 3], bucket_rows=1), greedy(4), 8))
    assert outputs["invalid"].tolist() == [False, True, False]
    assert sequences(outputs)[0] == [0, 1, 2, 3]


def test_decode_stops_where_its_slots_end_and_refuses_to_start_without_any() -> None:
    assert sequences(jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([0]), greedy(20, eos=-1), 5))) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="`slots`=3 leaves no room"):
        jaxgen.decode(COUNT_UP, jaxgen.Call(prompt([0]), greedy(20), 3))


def test_a_prepared_call_is_a_pure_function_of_its_key(tmp_path: Path) -> None:
    model = jaxgen.load(small_model(tmp_path))
    arguments = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
    call = jaxgen.prepare(model, [[5, 6], [7, 8]], eos_token_id=None, **arguments)

    def run(key: jax.Array) -> jax.Array:
        strategy = replace(call.strategy, key=key)
        return jaxgen.decode(model, replace(call, strategy=strategy))["sequences"][:, :7]

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(run))(keys)
    compiled = jax.jit(run)
    for key, sequences in zip(keys, together, strict=True):
        expected = jaxgen.generate(model, [[5, 6], [7, 8]], eos_token_id=None, key=key, **arguments)
        np.testing.assert_array_equal(sequences, expected)
        np.testing.assert_array_equal(compiled(key), expected)
    for key, decoded in ((7, run), (-7, compiled), ([3, 4], compiled)):
        expected = jaxgen.generate(model, [[5, 6], [7, 8]], eos_token_id=None, key=key, **arguments)
        np.testing.assert_array_equal(decoded(np.asarray(key)), expected)
    with pytest.raises(ValueError, match="`key` has dtype float32"):
        run(jnp.float32(7))


def test_what_runs_on_the_host_cannot_be_prepared() -> None:
    model = jaxgen.load(jaxgen.BUNDLED_MODEL)
    with pytest.raises(ValueError, match=r"runs on the host\. Write it as a JAX function"):
        jaxgen.prepare(model, [[5]], max_new_tokens=3, logits_processor=[lambda ids, scores: scores])
    with pytest.raises(ValueError, match=r"does not return .'attentions'"):
        jaxgen.prepare(model, [[5]], max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 3},
    ],
    ids=["beams", "groups", "candidates"],
)
def test_every_strategy_decodes_as_a_pure_function(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = jaxgen.load(small_model(tmp_path))
    arguments = {"max_new_tokens": 6, "eos_token_id": None, **arguments}
    expected = jaxgen.generate(model, [[5, 6], [7, 8]], **arguments)
    call = jaxgen.prepare(model, [[5, 6], [7, 8]], **arguments)
    outputs = jax.jit(jaxgen.decode)(model, call)
    best = outputs["sequences"] if "top_k" in arguments else outputs["sequences"][:, 0]
    assert outputs["length"] == 8
    np.testing.assert_array_equal(best[:2, :8], expected)


def test_growing_a_cache_frees_each_layer_of_the_old_one() -> None:
    cache = KVCache.zeros(3, 2, 6, 2, 4, jnp.float32)
    cache = replace(
        cache, layers=tuple((keys + layer, values - layer) for layer, (keys, values) in enumerate(cache.layers))
    )
    before = jaxgen.compile_counts()["grow"]
    grown = loop.grow(cache, 9)
    assert jaxgen.compile_counts()["grow"] == before + 1  # one program for all layers
    assert all(array.is_deleted() for pair in cache.layers for array in pair)
    assert grown.slots == 9
    for layer, (keys, values) in enumerate(grown.layers):
        np.testing.assert_array_equal(keys[..., :6, :], layer)
        np.testing.assert_array_equal(values[..., :6, :], -layer)


def test_programs_are_dropped_before_they_take_all_memory_maps_and_tokens_stay(
    model: Any, monkeypatch: Any, tmp_path: Path, caplog: Any
) -> None:
    """Of which XLA:CPU needs hundreds a program; without any left it aborts the process."""
    plain = jaxgen.generate(model, [[5, 6]], max_new_tokens=4)
    few, many = tmp_path / "few", tmp_path / "many"
    few.write_text("a map\n" * 10)
    many.write_text("a map\n" * 60)
    (tmp_path / "most").write_text("100\n")
    monkeypatch.setattr(loop, "_MOST_MAPS", tmp_path / "most")
    for maps, dropped in ((few, False), (many, True), (tmp_path / "none, as outside Linux", False)):
        monkeypatch.setattr(loop, "_MAPS", maps)
        monkeypatch.setattr(loop, "_built_at_last_look", -100)
        caplog.clear()
        before = jaxgen.compile_counts()
        np.testing.assert_array_equal(jaxgen.generate(model, [[5, 6]], max_new_tokens=4), plain)
        assert (jaxgen.compile_counts() != before) == dropped
        assert ("60 of the 100 memory maps" in caplog.text) == dropped

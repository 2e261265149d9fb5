"""Drawing tokens: exactly as transformers with the same noise, in law with our own, and reproducibly by key."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import torch_model
from random_calls import PROCESSORS, WARPERS, call, some
from scipy.stats import chisquare
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen.decoding import choice
from jaxgen.processors import logits_process

COMBINATIONS, CALLS_EACH = 11, 20
USUAL = (0, 1, 3)  # the others are for sweeps


# ---- Exactly, with the numbers of transformers ----


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.sweep] if seed not in USUAL else []) for seed in range(COMBINATIONS)]
)
def test_with_the_same_noise_every_token_equals_transformers(seed: int, folder: Path, model: Any) -> None:
    import torch

    twin = torch_model(folder)
    rng = np.random.default_rng(seed)
    names = [*some(rng, WARPERS, 1, 4), *some(rng, PROCESSORS, 0, 2)]
    names = [name for name in names if name != "guidance_scale"]
    copies = int(rng.choice([1, 1, 3]))
    with in_jaxgen(window=64 if seed % 2 else 8):
        for _ in range(CALLS_EACH):
            ids, kwargs = call(rng, names)
            kwargs |= {"do_sample": True, "num_return_sequences": copies}
            ours = jaxgen.generate(model, ids, key=0, **kwargs)
            mask = torch.tensor(kwargs.pop("attention_mask"))
            with in_torch():
                theirs = twin.generate(torch.tensor(ids), attention_mask=mask, **kwargs).numpy()
            np.testing.assert_array_equal(ours, theirs, err_msg=str(kwargs))


# ---- In law ----

DRAWS, TOKENS = 100_000, 40
LAWS: dict[str, list[Any]] = {
    "nothing": [],
    "temperature": [logits_process.Temperature(jnp.float32(0.6))],
    "top_k": [logits_process.TopK(jnp.int32(7)), logits_process.TopP(jnp.float32(1))],
    "top_p alone": [logits_process.TopK(jnp.int32(TOKENS)), logits_process.TopP(jnp.float32(0.8))],
    "the usual three": [
        logits_process.Temperature(jnp.float32(0.7)),
        logits_process.TopK(jnp.int32(20)),
        logits_process.TopP(jnp.float32(0.9)),
    ],
    "top_k, top_p, min_p": [
        logits_process.TopK(jnp.int32(20)),
        logits_process.TopP(jnp.float32(0.95)),
        logits_process.MinP(jnp.float32(0.1)),
    ],
    "typical": [logits_process.Typical(jnp.float32(0.7))],
    "epsilon and eta": [logits_process.Epsilon(jnp.float32(0.01)), logits_process.Eta(jnp.float32(0.02))],
    "top_h": [logits_process.TopH(jnp.float32(0.6))],
}


def drawn(processors: list[Any], logits: np.ndarray, key: Any, rows: int) -> np.ndarray:
    """int32 [rows]: the first token of as many rows with the same logits."""
    return np.asarray(_drawn(tuple(processors), logits, key, rows, choice.WINDOW))


@partial(jax.jit, static_argnums=(3, 4))
def _drawn(processors: tuple[Any, ...], logits: jax.Array, key: Any, rows: int, window: int) -> jax.Array:
    del window  # a global of the module, named here to build a program for each
    ids = jnp.ones((rows, 1), jnp.int32)
    prompt = jaxgen.Prompt(ids, ids > 0, jnp.int32(1), jnp.int32(rows))
    stop = jaxgen.EosToken(jnp.array([-1])), jaxgen.MaxLength(jnp.int32(2)), jnp.int32(0)
    strategy = jaxgen.Sample(*stop, key, processors)
    logits = jnp.broadcast_to(logits, (rows, len(logits)))
    return strategy.start(prompt, 2, logits, logits, {}).tokens


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in (1, 2))])
@pytest.mark.parametrize(
    "law",
    # The usual three hold these.
    [
        pytest.param(law, marks=[pytest.mark.sweep] if law in ("temperature", "top_k", "top_p alone") else [])
        for law in LAWS
    ],
)
def test_the_frequencies_of_100_000_draws_are_those_of_the_softmax(law: str, seed: int) -> None:
    logits = (2 * np.random.default_rng(seed).standard_normal(TOKENS)).astype(np.float32)
    scores = jnp.asarray(logits)[None]
    for processor in LAWS[law]:
        scores = processor(None, scores, None)
    p = np.exp(np.asarray(scores, np.float64)[0])
    p /= p.sum()
    counts = np.bincount(drawn(LAWS[law], logits, jax.random.key(seed), DRAWS), minlength=TOKENS)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], DRAWS * p[p > 0]).pvalue > 1e-3


# ---- Keys ----


def sampled(model: Any, ids: Any, key: Any, **kwargs: Any) -> list[list[int]]:
    ids = np.asarray(ids)
    kwargs = {
        "max_new_tokens": 12,
        "eos_token_id": None,
        "do_sample": True,
        "attention_mask": np.ones_like(ids),
    } | kwargs
    return jaxgen.generate(model, ids, key=key, **kwargs)[:, ids.shape[1] :].tolist()


def test_twenty_prompts_draw_the_same_alone_in_batches_in_other_orders_with_longer_mates_and_in_other_buckets(
    model: Any,
) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 97, (20, 7))
    keys = rng.integers(0, 2**31, 20).tolist()
    alone = [sampled(model, prompts[row : row + 1], [keys[row]])[0] for row in range(20)]
    assert len({tuple(row) for row in alone}) == 20
    for size in (2, 20):
        order = rng.permutation(20)[:size]
        together = sampled(model, prompts[order], [keys[row] for row in order])
        assert together == [alone[row] for row in order]
    for longer in (3, 20):  # the second one in another bucket of prompts, and with more slots
        padded = np.concatenate([np.zeros((20, longer), int), prompts], axis=1)
        mask = np.concatenate([np.zeros((20, longer), int), np.ones((20, 7), int)], axis=1)
        mates = rng.integers(3, 97, (12, longer + 7))
        ids, masks = np.concatenate([padded, mates]), np.concatenate([mask, np.ones_like(mates)])
        many = sampled(model, ids, [*keys, *range(12)], attention_mask=masks, max_new_tokens=12 + longer)
        assert [row[:12] for row in many[:20]] == alone


def test_the_same_key_gives_the_same_tokens_and_another_one_others(model: Any) -> None:
    assert sampled(model, [[5, 6]], 7) == sampled(model, [[5, 6]], 7) != sampled(model, [[5, 6]], 8)


def test_without_a_key_every_call_draws_afresh(model: Any) -> None:
    assert sampled(model, [[5, 6]], None) != sampled(model, [[5, 6]], None)


def test_a_key_may_be_an_int_a_typed_key_or_an_old_one(model: Any) -> None:
    expected = sampled(model, [[5, 6]], 7)
    for key in (np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), [7], jax.random.key(7)[None], [jnp.int32(7)]):
        assert sampled(model, [[5, 6]], key) == expected


def test_rows_with_one_key_draw_differently_and_so_do_the_sequences_of_a_prompt(model: Any) -> None:
    rows = sampled(model, [[5, 6]] * 4, 7)
    assert len({tuple(row) for row in rows}) == 4
    sequences = sampled(model, [[5, 6], [5, 6]], 7, num_return_sequences=3)
    assert len({tuple(row) for row in sequences}) == 6
    assert [sequences[0], sequences[3]] == rows[:2]  # the first sequence of a prompt is what it draws alone


def test_a_filter_keeps_the_tokens_that_would_have_been_drawn_anyway(model: Any) -> None:
    """The noise belongs to the token, so a wider filter changes a draw only by adding a better one."""
    every = [sampled(model, [[5, 6]], key, top_k=0, max_new_tokens=1)[0][0] for key in range(20)]
    some = [sampled(model, [[5, 6]], key, top_k=90, max_new_tokens=1)[0][0] for key in range(20)]
    assert np.mean(np.array(every) == np.array(some)) > 0.9


@pytest.mark.parametrize("key", ["seven", 1.5, [1, 2, 3], np.zeros((2, 2, 2), np.uint32), object()])
def test_what_is_no_key_or_not_one_per_prompt_is_refused(key: Any, model: Any) -> None:
    with pytest.raises(ValueError, match=r"`key`.*Pass an int, a jax\.random key, or one of either per prompt"):
        sampled(model, [[5, 6], [7, 8]], key)


# ---- Candidates ----


@pytest.mark.parametrize("top_k", [1, 3, 7, 8, 9, 97])
@pytest.mark.parametrize(("top_p", "keep"), [(0.2, 1), (0.9, 1), (1.0, 1), (0.01, 3)])
def test_a_draw_from_few_candidates_is_the_draw_from_all(
    top_k: int, top_p: float, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ties at every border: the scores are whole numbers."""
    logits = np.random.default_rng(top_k).integers(-3, 4, 97).astype(np.float32)
    chain = [logits_process.TopK(jnp.int32(top_k)), logits_process.TopP(jnp.float32(top_p), keep)]
    whole = drawn(
        [*chain, logits_process.Custom(jax.tree_util.Partial(_unchanged), type(_unchanged))],
        logits,
        jax.random.key(0),
        500,
    )
    monkeypatch.setattr(choice, "WINDOW", 8)
    np.testing.assert_array_equal(drawn(chain, logits, jax.random.key(0), 500), whole)


def _unchanged(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return scores


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("processors", [[], LAWS["the usual three"]], ids=["all", "few"])
def test_a_row_with_nan_or_infinity_is_reported_and_draws_a_token_of_the_vocabulary(
    bad: float, processors: Any
) -> None:
    logits = np.zeros((3, 97), np.float32)
    logits[1, 40] = bad
    logits[2] = -np.inf
    prompt = jaxgen.Prompt(jnp.ones((3, 1), jnp.int32), jnp.ones((3, 1), bool), jnp.int32(1), jnp.int32(3))
    stop = jaxgen.EosToken(jnp.array([-1])), jaxgen.MaxLength(jnp.int32(2)), jnp.int32(0)
    strategy = jaxgen.Sample(*stop, jax.random.key(0), tuple(processors))
    state = strategy.start(prompt, 2, jnp.asarray(logits), jnp.asarray(logits), {})
    assert state.invalid.tolist() == [False, True, True]
    assert all(0 <= token < 97 for token in state.tokens.tolist())


def test_greedy_decoding_reports_them_too_unless_they_are_removed(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return scores.at[1, 5].set(jnp.nan)

    plain = jaxgen.generate(model, [[5, 6], [7, 8]], max_new_tokens=4, eos_token_id=None)
    with caplog.at_level("WARNING", logger="jaxgen"):
        spoiled = jaxgen.generate(
            model, [[5, 6], [7, 8]], max_new_tokens=4, eos_token_id=None, logits_processor=[spoil]
        )
    assert "Rows [1] produced NaN or infinite scores" in caplog.text
    np.testing.assert_array_equal(spoiled[0], plain[0])

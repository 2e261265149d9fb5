"""Beam search and beam sampling: the beams of transformers, and what it takes to get them from a shared cache."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_calls import PROCESSORS, VOCAB, WARPERS, call, some
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen.decoding import loop

COMBINATIONS, CALLS_EACH = 16, 13
SAMPLED = 7  # combinations
USUAL, USUAL_SAMPLED = 4, 2  # the others are for sweeps
FLAGS = {"return_dict_in_generate": True, "output_scores": True}
IDS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = np.array([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])


def beams(model: Any, ids: Any = IDS, **kwargs: Any) -> Any:
    arguments = {"attention_mask": MASK, "num_beams": 3, "max_new_tokens": 8, "eos_token_id": None, **FLAGS}
    return jaxgen.generate(model, ids, **{**arguments, **kwargs})


def theirs(twin: Any, ids: np.ndarray, kwargs: dict[str, Any]) -> Any:
    import torch

    mask = torch.tensor(kwargs["attention_mask"])
    return twin.generate(torch.tensor(ids), **{**kwargs, "attention_mask": mask}, **FLAGS)


def assert_equal_to_transformers(model: Any, twin: Any, ids: np.ndarray, kwargs: dict[str, Any]) -> None:
    ours, expected = jaxgen.generate(model, ids, **FLAGS, **kwargs), theirs(twin, ids, kwargs)
    told = str({name: value for name, value in kwargs.items() if name != "attention_mask"})
    np.testing.assert_array_equal(ours.sequences, expected.sequences, err_msg=told)
    np.testing.assert_array_equal(ours.beam_indices, expected.beam_indices, err_msg=told)
    np.testing.assert_allclose(ours.sequences_scores, expected.sequences_scores, rtol=1e-3, err_msg=told)
    scores = np.stack([step.numpy() for step in expected.scores])
    np.testing.assert_array_equal(np.isneginf(ours.scores), np.isneginf(scores), err_msg=told)
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-3, atol=1e-4, err_msg=told)


# ---- Exactly as transformers ----


def beam_call(
    rng: np.random.Generator, names: list[str], num_beams: int, eos_ids: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """A random call with beams; the names, `num_beams` and `eos_ids` decide which program runs.

    Several forced eos ids get a score of 0 each, so that beams tie exactly, and torch's choice among equals is nobody's
    business: one is forced here.
    """
    ids, kwargs = call(rng, names)
    eos = rng.choice(np.arange(3, VOCAB), eos_ids, replace=False).tolist() or None
    if "exponential_decay_length_penalty" in names and eos is None:
        del kwargs["exponential_decay_length_penalty"]
    if "forced_eos_token_id" in names:
        kwargs["forced_eos_token_id"] = kwargs["forced_eos_token_id"][:1]
    return ids, kwargs | {
        "eos_token_id": eos,
        "num_beams": num_beams,
        "num_return_sequences": int(rng.integers(1, num_beams + 1)),
        "max_new_tokens": int(rng.integers(9, 13)),  # of one bucket
        "early_stopping": [True, False, "never"][int(rng.integers(3))],
        "length_penalty": float(rng.choice([0.0, rng.uniform(-1, 2)])),
    }


def seeds(count: int, usual: int) -> list[Any]:
    return [pytest.param(seed, marks=[] if seed < usual else [pytest.mark.sweep]) for seed in range(count)]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", seeds(COMBINATIONS, USUAL))
def test_sequences_scores_and_indices_equal_transformers(seed: int, model: Any, twin: Any) -> None:
    rng = np.random.default_rng(seed)
    names = some(rng, {name: None for name in PROCESSORS if name != "guidance_scale"}, 0, 3)
    num_beams, eos_ids = 2 + seed % 5, int(rng.choice([0, 1, 1, 2, 3, 5, 8]))
    for _ in range(CALLS_EACH):
        assert_equal_to_transformers(model, twin, *beam_call(rng, names, num_beams, eos_ids))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", seeds(SAMPLED, USUAL_SAMPLED))
def test_with_the_same_noise_sampled_beams_equal_transformers(seed: int, model: Any, twin: Any) -> None:
    """Filters leave too few tokens now and then, and which of the impossible ones transformers draws is arbitrary."""
    rng = np.random.default_rng(seed)
    warpers = ["temperature", "top_k", *some(rng, {name: None for name in WARPERS if name not in LEAVE_FEW}, 0, 2)]
    names = sorted({*warpers, *some(rng, {"repetition_penalty": None, "min_new_tokens": None}, 0, 2)})
    with in_jaxgen():
        for _ in range(8):
            ids, kwargs = beam_call(rng, names, 2 + seed % 3, int(seed % 4))
            kwargs |= {"do_sample": True, "top_k": int(rng.choice([0, 40, 90]))}
            ours = jaxgen.generate(model, ids, key=0, **FLAGS, **kwargs)
            with in_torch():
                expected = theirs(twin, ids, kwargs)
            np.testing.assert_array_equal(ours.sequences, expected.sequences, err_msg=str(kwargs))
            np.testing.assert_array_equal(ours.beam_indices, expected.beam_indices, err_msg=str(kwargs))


LEAVE_FEW = {"top_h", "top_k", "temperature"}


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [{}, {"eos_token_id": 60}, {"repetition_penalty": 1.3}], ids=str)
def test_allowed_tokens_by_prefix_get_the_numbers_of_prompts(arguments: Any, model: Any, twin: Any) -> None:
    def allowed(batch_id: int, tokens: Any) -> list[int]:
        return [(int(tokens[-1]) * 7 + batch_id) % 90 + 3, 50 + batch_id, 60, 20 + int(tokens[-1]) % 7]

    kwargs = {
        "attention_mask": MASK, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "pad_token_id": 0,
        "eos_token_id": None, "prefix_allowed_tokens_fn": allowed,
    }  # fmt: skip
    assert_equal_to_transformers(model, twin, IDS, {**kwargs, **arguments})


@pytest.mark.oracle
def test_a_criterion_finishes_beams_and_what_follows_them_is_filled_as_in_transformers(model: Any, twin: Any) -> None:
    import transformers

    class LastIsMultiple(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids[:, -1] % 5 == 0

    def last_is_multiple(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return input_ids[:, cur_len - 1] % 5 == 0

    kwargs: dict[str, Any] = {"attention_mask": MASK, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 8}
    for ids in ({"eos_token_id": None}, {"eos_token_id": 60, "pad_token_id": 0}, {"eos_token_id": 60}):
        expected = theirs(twin, IDS, {**kwargs, **ids, "stopping_criteria": [LastIsMultiple()]})
        for criterion in (LastIsMultiple(), last_is_multiple, lambda ids, scores: ids[:, -1] % 5 == 0):
            ours = jaxgen.generate(model, IDS, **kwargs, **ids, **FLAGS, stopping_criteria=[criterion])
            np.testing.assert_array_equal(ours.sequences, expected.sequences)
            np.testing.assert_allclose(ours.sequences_scores, expected.sequences_scores, rtol=1e-3)
        assert (expected.beam_indices < 0).any()  # a beam ended before others


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", ["lefthash", "synthid"])
def test_watermarked_beams_equal_transformers(scheme: str, model: Any, twin: Any) -> None:
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    config: Any = WatermarkingConfig(bias=3.0)
    if scheme == "synthid":
        config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836], sampling_table_size=2**10)
    kwargs = {"attention_mask": MASK, "num_beams": 3, "max_new_tokens": 8, "eos_token_id": None}
    assert_equal_to_transformers(model, twin, IDS, {**kwargs, "watermarking_config": config})


# ---- What a beam is ----


def test_one_beam_is_greedy_decoding(model: Any) -> None:
    greedy = jaxgen.generate(model, IDS, attention_mask=MASK, max_new_tokens=8, eos_token_id=None)
    np.testing.assert_array_equal(beams(model, num_beams=1).sequences, greedy)
    call = jaxgen.prepare(model, IDS, attention_mask=MASK, num_beams=2, max_new_tokens=8, eos_token_id=None)
    alone = dataclasses.replace(call.strategy, num_beams=1, num_candidates=2)
    found = jax.jit(jaxgen.decode)(model, dataclasses.replace(call, strategy=alone))["sequences"]
    np.testing.assert_array_equal(found[: len(IDS), 0, : greedy.shape[1]], greedy)


def test_a_prompts_beams_do_not_depend_on_its_batch_mates_padding_or_bucket(model: Any) -> None:
    arguments = {"eos_token_id": [20, 30, 40], "pad_token_id": 0, "num_return_sequences": 3, "max_new_tokens": 12}
    for more in ({}, {"do_sample": True, "early_stopping": True}):
        prompts = np.random.default_rng(0).integers(3, 97, (5, 4))

        def of(rows: list[int], padding: int, more: Any = more, prompts: Any = prompts) -> list[Any]:
            ids = np.concatenate([np.zeros((len(rows), padding), int), prompts[rows]], axis=1)
            mask = np.concatenate([np.zeros((len(rows), padding), int), np.ones((len(rows), 4), int)], axis=1)
            keys = {"key": [7 + row for row in rows]} if more.get("do_sample") else {}
            out = beams(model, ids, attention_mask=mask, **{**arguments, **more, **keys})
            lengths = (out.beam_indices >= 0).sum(axis=1)
            texts = [row[:n].tolist() for row, n in zip(out.sequences[:, padding + 4 :], lengths, strict=True)]
            return [(texts[3 * row : 3 * row + 3]) for row in range(len(rows))]

        alone = [of([row], 0)[0] for row in range(5)]
        assert of([4, 2, 0, 3, 1], 14) == [alone[row] for row in (4, 2, 0, 3, 1)]


def test_sampled_beams_are_those_of_their_key(model: Any) -> None:
    first, again, other = (beams(model, do_sample=True, key=key).sequences.tolist() for key in (1, 1, 2))
    assert first == again != other


def test_the_scores_of_a_beam_add_up_to_its_score(model: Any) -> None:
    out = beams(model, eos_token_id=[20, 30, 40], num_return_sequences=3, length_penalty=0.7)
    scores = jaxgen.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    lengths = (out.beam_indices >= 0).sum(axis=1)
    np.testing.assert_allclose(scores.sum(axis=1) / lengths**0.7, out.sequences_scores, rtol=1e-4)


@pytest.mark.parametrize("padding", [0, 2])
def test_guided_beams_have_the_scores_of_their_own_texts(padding: int, model: Any) -> None:
    """Transformers forgets to reorder the cache of the negative prompts, so its numbers are those of other texts."""
    mask = (np.arange(5) >= [[padding], [0], [0]]).astype(int)
    negative = np.array([[9, 8, 7]] * 3)
    out = beams(model, attention_mask=mask, guidance_scale=2.0, negative_prompt_ids=negative, num_return_sequences=3)

    def log_p(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """float [9, 8, V] of the new tokens, after the prompts that the rows of three share."""
        prompts, masks = np.repeat(ids, 3, axis=0), np.repeat(mask, 3, axis=0)
        texts = np.concatenate([prompts, out.sequences[:, 5:]], axis=1)
        whole = np.concatenate([masks, np.ones((9, 8), int)], axis=1)
        return np.asarray(jax.nn.log_softmax(jax.jit(type(model).__call__)(model, texts, whole)))[:, -9:-1]

    guided, unguided = log_p(IDS, mask), log_p(negative, np.ones_like(negative))
    expected = np.take_along_axis(2.0 * (guided - unguided) + unguided, out.sequences[:, 5:, None], axis=2)[:, :, 0]
    found = jaxgen.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_prompt_with_nan_is_reported_and_the_others_go_on(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return scores.at[3, 5].set(jnp.nan)  # the first beam of the second prompt

    plain = beams(model, num_return_sequences=1).sequences
    with caplog.at_level("WARNING", logger="jaxgen"):
        spoiled = beams(model, num_return_sequences=1, logits_processor=[spoil]).sequences
    assert "Rows [1] produced NaN or infinite scores" in caplog.text
    np.testing.assert_array_equal(spoiled[[0, 2]], plain[[0, 2]])


def test_half_precision_decodes_with_beams_too(folder: Path) -> None:
    out = beams(jaxgen.load(folder, "bfloat16"), num_return_sequences=3)
    assert out.sequences.shape == (9, 13) and np.isfinite(out.sequences_scores).all()


# ---- Programs, memory, refusals ----


def test_new_numbers_compile_nothing(model: Any) -> None:
    first = {"eos_token_id": [20, 30], "pad_token_id": 0, "repetition_penalty": 1.2, "do_sample": True, "key": 0}
    beams(model, **first)
    before = jaxgen.compile_counts()
    for change in (
        {"length_penalty": -0.3}, {"early_stopping": True}, {"early_stopping": np.bool_(True)},
        {"early_stopping": "never"}, {"eos_token_id": [7, 9]}, {"pad_token_id": 3}, {"repetition_penalty": 0.8},
        {"key": 5}, {"temperature": 0.3}, {"top_k": 9}, {"num_return_sequences": 2}, {"max_new_tokens": 7},
    ):  # fmt: skip
        beams(model, **{**first, **change})
    assert jaxgen.compile_counts() == before


def test_the_cache_holds_a_prompt_once_for_all_its_beams(model: Any) -> None:
    call = jaxgen.prepare(model, np.ones((1, 512), int), num_beams=4, max_new_tokens=64, eos_token_id=None)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    for array in jax.tree.leaves(state.cache.layers):
        assert array.size == heads * (512 + 4 * 64) * head_dim
    assert state.cache.valid.shape == (1, 4, 512 + 4 * 64)


REFUSED = {
    "no beams": ({"num_beams": 0}, "`num_beams`=0 must be at least 1"),
    "beams of a wrong type": ({"num_beams": 2.0}, "`num_beams`=2.0 must be an integer"),
    "more sequences than beams": (
        {"num_beams": 2, "num_return_sequences": 3},
        r"`num_return_sequences` \(3\) has to be smaller or equal to `num_beams` \(2\)",
    ),
    "an early stopping of its own": ({"early_stopping": "soon"}, "`early_stopping` must be a boolean or 'never'"),
    "a length penalty of NaN": ({"length_penalty": float("nan")}, "`length_penalty`=nan must be a finite number"),
    "log-probabilities": ({"output_logprobs": True}, "`output_logprobs` is for greedy decoding and sampling"),
    "every token an end": (
        {"eos_token_id": [*range(97)]},
        "`eos_token_id` holds 97 ids, but the vocabulary has only 97 ids",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_before_anything_is_compiled(case: str, model: Any) -> None:
    kwargs, message = REFUSED[case]
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        beams(model, **kwargs)
    assert jaxgen.compile_counts() == before


@pytest.mark.sweep
@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_four_hundred_more_combinations(seed: int, model: Any, twin: Any) -> None:
    rng = np.random.default_rng(seed)
    names = some(rng, {name: None for name in PROCESSORS if name != "guidance_scale"}, 0, 3)
    assert_equal_to_transformers(model, twin, *beam_call(rng, names, int(rng.integers(2, 7)), int(rng.integers(0, 9))))

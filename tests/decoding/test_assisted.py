"""Assisted decoding: the tokens are those of the same call without drafts, and good drafts save steps."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from architectures import family_member
from drafts import assisted
from random_calls import PROCESSORS, WARPERS, call, small_model, some

import jaxgen
from jaxgen.generation.running import driver

COMBINATIONS, CALLS_EACH = 60, 4
USUAL = 2  # the others are for sweeps
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logprobs": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return jaxgen.load(small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def tiny_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that are full after a few steps, so that holes are squeezed out and slots added all the time."""
    monkeypatch.setattr(driver, "_FEWEST_SLOTS", 1)


def assert_equal(ours: Any, plain: Any, message: object) -> None:
    np.testing.assert_array_equal(ours.sequences, plain.sequences, err_msg=str(message))
    for name in ("logprobs", "processed_logprobs"):
        np.testing.assert_allclose(ours[name], plain[name], atol=2e-4, err_msg=f"{name} {message}")
    # Scores after the end of a row mean nothing.
    kept = (plain.logprobs != 0).T
    assert ours.scores.shape == plain.scores.shape
    np.testing.assert_array_equal(np.isneginf(ours.scores)[kept], np.isneginf(plain.scores)[kept], err_msg=str(message))
    finite = kept[:, :, None] & np.isfinite(plain.scores)
    np.testing.assert_allclose(ours.scores[finite], plain.scores[finite], rtol=1e-3, atol=1e-3, err_msg=str(message))


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.sweep] if seed >= USUAL else []) for seed in range(COMBINATIONS)]
)
def test_whatever_the_drafts_tokens_scores_and_logprobs_are_those_of_the_plain_call(
    seed: int, small: Any, tiny_caches: None
) -> None:
    rng = np.random.default_rng(seed)
    names = some(rng, PROCESSORS, 0, 3)
    samples = bool(seed % 2)
    names += some(rng, WARPERS, 0, 3) if samples else []
    num_tokens = int(rng.choice([1, 3, 5]))
    copies = int(rng.choice([1, 3])) if samples else 1
    for number in range(CALLS_EACH):
        ids, keywords = call(rng, names)
        keywords |= {**OUTPUTS, "do_sample": samples, "num_return_sequences": copies, "key": seed + number}
        plain = jaxgen.generate(small, ids, **keywords)
        wrong = [0.0, 0.3, 1.0][number % 3]
        texts = None if number == 3 else plain.sequences
        ours, _ = assisted(small, ids, texts, num_tokens, wrong, seed, **keywords)
        assert_equal(ours, plain, (names, num_tokens, wrong, keywords))


# ---- How many steps ----

PROMPTS = np.array([[5, 9, 17, 4, 8, 11], [0, 0, 7, 12, 3, 19], [0, 6, 13, 5, 9, 14]])
MASK = (PROMPTS != 0).astype(int)
CALL: dict[str, Any] = {"attention_mask": MASK, "eos_token_id": None, "max_new_tokens": 25}


@pytest.mark.parametrize(("wrong", "steps"), [(0.0, 6), (1.0, 24)])
def test_right_drafts_save_steps_and_wrong_ones_cost_none(wrong: float, steps: int, model: Any) -> None:
    plain = jaxgen.generate(model, PROMPTS, **CALL)
    texts = plain if wrong == 0 else np.full_like(plain, 2)  # a token that is not in the texts
    assert 2 not in plain
    ours, counts = assisted(model, PROMPTS, texts, 3, **CALL)
    np.testing.assert_array_equal(ours, plain)
    assert counts["steps"] == steps  # the prompt's pass chooses the first token, and 24 are left
    np.testing.assert_array_equal(counts["accepted"][:3], 18 if wrong == 0 else 0)
    assert counts["used"] == 24  # the slots of dropped tokens are written again


def test_rows_get_ahead_of_each_other(model: Any, tiny_caches: None) -> None:
    """Drafts for one row only: the batch takes as many steps as its slowest row."""
    plain = jaxgen.generate(model, PROMPTS, **CALL)
    texts = np.full_like(plain, 2)
    texts[1] = plain[1]
    ours, counts = assisted(model, PROMPTS, texts, 3, **CALL)
    np.testing.assert_array_equal(ours, plain)
    assert counts["steps"] == 24
    np.testing.assert_array_equal(counts["accepted"][:3], [0, 18, 0])
    assert counts["slots"] == 64  # the prompt's 8, 24 tokens, 4 of a step, doubled once the cache was full


def test_a_text_that_repeats_itself_is_looked_up(model: Any) -> None:
    loop = np.array([[5, 9, 17, 4, 5, 9, 17, 4, 5, 9, 17]])
    plain = jaxgen.generate(model, loop, max_new_tokens=40, eos_token_id=None, suppress_tokens=[*range(20, 97)])
    call = {"max_new_tokens": 40, "eos_token_id": None, "suppress_tokens": [*range(20, 97)]}
    ours, counts = assisted(model, loop, None, 3, **call)
    np.testing.assert_array_equal(ours, plain)
    assert counts["steps"] + counts["accepted"][0] == 39
    assert counts["accepted"][0] > 0


# ---- With everything else ----


def test_rules_with_a_memory_forget_the_drafts_that_were_dropped(model: Any) -> None:
    rules = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3}
    plain = jaxgen.generate(model, PROMPTS, **CALL, **rules)
    ours, counts = assisted(model, PROMPTS, plain, 3, 0.4, **CALL, **rules)
    np.testing.assert_array_equal(ours, plain)
    assert 24 > counts["steps"] > 6


def test_a_criterion_or_stop_string_ends_a_row_within_a_draft(bundled: Any, tokenizer: Any) -> None:
    def says_said(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return (jax.lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1) == said)[:, 0]

    said = tokenizer(" said", add_special_tokens=False)["input_ids"][-1]
    prompts = tokenizer(["Once upon a time", "One day, a small fox"], padding=True, return_tensors="np")
    for rule in ({"stop_strings": ["morning", "toy"], "tokenizer": tokenizer}, {"stopping_criteria": [says_said]}):
        keywords = {**prompts, "max_new_tokens": 40, **rule}
        ids = keywords.pop("input_ids")
        free = jaxgen.generate(bundled, ids, attention_mask=keywords["attention_mask"], max_new_tokens=40)
        plain = jaxgen.generate(bundled, ids, **keywords)
        assert plain.shape[1] < free.shape[1]
        ours, _ = assisted(bundled, ids, free, 3, **keywords)
        np.testing.assert_array_equal(ours, plain)


def test_its_cache_continues_as_that_of_the_plain_call_does(model: Any, tiny_caches: None) -> None:
    """Also where a row has ended, whose padding later calls attend if their mask says so."""
    eos = int(jaxgen.generate(model, PROMPTS, **CALL)[1, 10])
    keywords = {**CALL, "eos_token_id": eos, "pad_token_id": 1, "return_dict_in_generate": True}
    plain = jaxgen.generate(model, PROMPTS, **keywords)
    texts = plain.sequences.copy()
    texts[2] = 2  # ends later than its drafts are right, so that rows are at different lengths
    ours, _ = assisted(model, PROMPTS, texts, 3, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    assert ours.cache.get_seq_length() == plain.cache.get_seq_length() == plain.sequences.shape[1] - 1
    more = np.concatenate([plain.sequences, [[7], [8], [9]]], axis=1)
    mask = np.pad(MASK, ((0, 0), (0, more.shape[1] - MASK.shape[1])), constant_values=1)
    call = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None}
    expected = jaxgen.generate(model, more, cache=plain.cache, **call)
    np.testing.assert_array_equal(jaxgen.generate(model, more, cache=ours.cache, **call), expected)
    again, _ = assisted(model, more, expected, 3, cache=ours.cache, **call)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    ("model_type", "seed", "chunk"), [pytest.param("mistral", 2, 4, marks=pytest.mark.sweep), ("qwen2", 4, None)]
)
def test_windows_count_the_columns_of_the_text_and_not_the_holes(
    model_type: str, seed: int, chunk: int | None, tmp_path: Path, tiny_caches: None
) -> None:
    windows = jaxgen.load(family_member(model_type, seed).write(tmp_path))
    keywords = {**CALL, "prefill_chunk_size": chunk}
    plain = jaxgen.generate(windows, PROMPTS, **keywords)
    texts = plain.copy()
    texts[0] = 2
    ours, _ = assisted(windows, PROMPTS, texts, 3, **keywords)
    np.testing.assert_array_equal(ours, plain)


def test_it_streams_in_chunks_and_decodes_inside_jit(model: Any, tiny_caches: None) -> None:
    keywords = {**CALL, "do_sample": True, "key": 3, "prompt_lookup_num_tokens": 3}
    expected = jaxgen.generate(model, PROMPTS, **{**CALL, "do_sample": True, "key": 3})
    chunks = [*jaxgen.stream(model, PROMPTS, **keywords)]
    np.testing.assert_array_equal(np.concatenate([PROMPTS, *chunks], axis=1), expected)
    call = jaxgen.prepare(model, PROMPTS, **keywords)
    outputs = jax.jit(jaxgen.decode)(model, call)
    np.testing.assert_array_equal(outputs["sequences"][:3, : outputs["length"]], expected)


def test_another_number_of_tokens_compiles_nothing(model: Any) -> None:
    jaxgen.generate(model, PROMPTS, **CALL, prompt_lookup_num_tokens=7)
    before = jaxgen.compile_counts()
    for num_tokens, ngram, new in ((4, None, 25), (5, 1, 24), (6, 4, 23)):
        keywords = {**CALL, "max_new_tokens": new}
        ours = jaxgen.generate(
            model, PROMPTS, **keywords, prompt_lookup_num_tokens=num_tokens, max_matching_ngram_size=ngram
        )
        assert ours.shape[1] == PROMPTS.shape[1] + new
    assert jaxgen.compile_counts() == before

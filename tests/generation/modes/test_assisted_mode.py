"""What cannot be combined with drafts is refused by name, and any model or class may draft."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_decoders import encoder_decoder

import jaxgen
from jaxgen.decoding.drafters import Choose, Texts
from jaxgen.generation import user_warnings
from jaxgen.pytree import pytree

PROMPT = np.array([[5, 9, 17]])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "`prompt_lookup_num_tokens`=0"),
        ({"prompt_lookup_num_tokens": 65}, "`prompt_lookup_num_tokens`=65 must be from 1 to 64"),
        ({"max_matching_ngram_size": -1}, "`max_matching_ngram_size`=-1 must be from 0 to 64"),
        ({"num_beams": 2}, "cannot be combined with `num_beams`=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "cannot be combined with `penalty_alpha`=0.6"),
        ({"use_cache": False}, "needs a cache"),
        (
            {"output_attentions": True, "return_dict_in_generate": True},
            "`output_attentions`=True cannot be combined with",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_prompt_lookup_is_refused_by_name(
    keywords: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, PROMPT, **{"prompt_lookup_num_tokens": 3, "max_new_tokens": 4, **keywords})


def test_a_streamer_gets_the_prompts_and_then_every_token(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.taken: list[np.ndarray] = []

        def put(self, value: np.ndarray) -> None:
            self.taken.append(np.asarray(value))

        def end(self) -> None:
            self.taken.append(np.array([-1]))

    streamer = Streamer()
    keywords = {"max_new_tokens": 9, "eos_token_id": None}
    output = jaxgen.generate(model, PROMPT, streamer=streamer, prompt_lookup_num_tokens=3, **keywords)
    np.testing.assert_array_equal(output, jaxgen.generate(model, PROMPT, **keywords))
    np.testing.assert_array_equal(streamer.taken[0], PROMPT)
    assert [int(token[0]) for token in streamer.taken[1:]] == [*output[0, 3:].tolist(), -1]


# ---- An assistant model ----


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"assistant_model": "folder"}, "`assistant_model`='folder' must be a jaxgen model"),
        ({"assistant_model": object()}, "must be a jaxgen model, such as `jaxgen.load` returns"),
        ({"assistant_model": []}, "must be a jaxgen model"),
        ({"assistant_model": jaxgen.Drafter()}, "needs `most_tokens`"),
        (
            {"assistant_tokenizer": "gpt2", "tokenizer": "gpt2"},
            "`tokenizer`='gpt2' must be a transformers tokenizer",
        ),
        ({"num_assistant_tokens": 0}, "`num_assistant_tokens`=0 must be from 1 to 64"),
        ({"num_assistant_tokens": 65}, "`num_assistant_tokens`=65 must be from 1 to 64"),
        ({"assistant_confidence_threshold": 1.5}, "`assistant_confidence_threshold`=1.5 must be from 0 to 1"),
        ({"num_assistant_tokens_schedule": "fast"}, "`num_assistant_tokens_schedule`='fast' must be one of"),
        ({"assistant_early_exit": 0}, "`assistant_early_exit`=0 must be at least 1"),
        (
            {"assistant_early_exit": 1},
            "`assistant_early_exit`=1: the model has 1 layers, and a draft model must have fewer",
        ),
        (
            {"num_beams": 2},
            "`assistant_model` is for greedy decoding and sampling, and cannot be combined with `num_beams`=2",
        ),
        ({"penalty_alpha": 0.6, "top_k": 4}, "cannot be combined with `penalty_alpha`=0.6"),
        ({"use_cache": False}, "`assistant_model` needs a cache"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "`output_hidden_states`=True cannot be combined",
        ),
        ({"assistant_ensemble_weight": 0.5}, "`assistant_ensemble_weight`=0.5 is not supported"),
        ({"use_mtp": True}, "`use_mtp`=True is not supported"),
        ({"speculation_type": "dflash"}, "`speculation_type`='dflash' is not supported"),
        ({"inputs": None, "inputs_embeds": np.zeros((1, 3, 32))}, "which `inputs_embeds` lacks"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_an_assistant_is_refused_before_anything_is_compiled(
    keywords: dict[str, Any], message: str, model: Any
) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, **{"inputs": PROMPT, "assistant_model": model, "max_new_tokens": 4, **keywords})
    assert jaxgen.compile_counts() == before


def test_an_assistant_with_another_vocabulary_is_refused_and_one_that_is_padded_differently_is_not(model: Any) -> None:
    config = model.config.to_json()
    other = jaxgen.from_config({**config, "vocab_size": config["vocab_size"] * 2})
    with pytest.raises(ValueError, match="has a vocabulary of 194 tokens, but the model has 97"):
        jaxgen.generate(model, PROMPT, assistant_model=other, max_new_tokens=4)
    call = {"max_new_tokens": 9, "do_sample": True, "key": 0}
    plain = jaxgen.generate(model, PROMPT, **call)
    for more in (7, -7):
        padded = jaxgen.from_config({**config, "vocab_size": config["vocab_size"] + more})
        np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, assistant_model=padded, **call), plain)


def test_of_several_drafters_the_first_counts_and_the_others_are_named(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    user_warnings._warned.clear()
    keywords = {"max_new_tokens": 9, "eos_token_id": None}
    ours = jaxgen.generate(model, PROMPT, assistant_model=model, prompt_lookup_num_tokens=2, **keywords)
    np.testing.assert_array_equal(ours, jaxgen.generate(model, PROMPT, **keywords))
    assert (
        "`prompt_lookup_num_tokens` drafts the tokens of this call, and `assistant_model` has no effect" in caplog.text
    )


def test_a_copy_in_int8_drafts_for_the_model(bundled: Any, tokenizer: Any) -> None:
    prompts = tokenizer(["Once upon a time", "One day, a small fox"], padding=True, return_tensors="np")
    keywords = {**prompts, "max_new_tokens": 30, "return_dict_in_generate": True}
    plain = jaxgen.generate(bundled, **keywords)
    ours = jaxgen.generate(bundled, assistant_model=jaxgen.to_int8(bundled), num_assistant_tokens=3, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    assert (ours.accepted > 0.6 * ours.drafted).all()
    with pytest.raises(ValueError, match="already in int8"):
        jaxgen.to_int8(jaxgen.to_int8(bundled))


@pytree
@dataclass(frozen=True)
class Again(jaxgen.Drafter[jax.Array]):
    """Drafts the last token again, and remembers how often it was asked."""

    most_tokens: int = field(metadata={"static": True})

    def init(self, prompt: jaxgen.Prompt, copies: int, slots: int) -> jax.Array:
        return jnp.int32(0)

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: jax.Array) -> jaxgen.Draft[jax.Array]:
        last = jnp.take_along_axis(texts.tokens, texts.lengths[:, None] - 1, axis=1)
        return jaxgen.Draft(jnp.repeat(last, self.most_tokens, axis=1), jnp.where(memory > 2, limits, 0), memory + 1)


def test_a_drafter_of_the_callers_own(model: Any) -> None:
    keywords = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": 0.2, "return_dict_in_generate": True}
    plain = jaxgen.generate(model, PROMPT, **keywords)
    ours = jaxgen.generate(model, PROMPT, assistant_model=Again(3), **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    assert ours.accepted[0] > 0
    assert ours.rounds[0] + ours.accepted[0] == 12


# ---- Functions on the host ----


@pytest.mark.parametrize("copies", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_functions_on_the_host_see_each_token_with_the_text_before_it(copies: int, model: Any) -> None:
    """An even token is followed by an odd one, by a function of NumPy; and a criterion ends texts at their length."""
    prompts = np.array([[5, 9, 17], [0, 7, 12], [6, 13, 8]])
    seen: list[tuple[int, ...]] = []

    def odd_and_even(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(input_ids.shape)
        parity = np.arange(scores.shape[1]) % 2
        return np.where(parity[None] != input_ids[:, -1:] % 2, scores, -np.inf)

    def allowed(prompt: int, tokens: np.ndarray) -> list[int]:
        return [token for token in range(97) if token % 3 != (prompt + len(tokens)) % 3]

    def says_20(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return (input_ids == ends).any(axis=1)

    ends = -1
    keywords = {
        "attention_mask": (prompts != 0).astype(int),
        "max_new_tokens": 16,
        "eos_token_id": 2,  # with one, a row that a criterion finishes is padded
        "pad_token_id": 0,
        "logits_processor": [odd_and_even],
        "prefix_allowed_tokens_fn": allowed,
        "stopping_criteria": [says_20],
        "do_sample": copies > 1,
        "num_return_sequences": copies,
        "key": 4,
    }
    free = jaxgen.generate(model, prompts, **keywords)
    ends = int(free[0, 9])
    plain = jaxgen.generate(model, prompts, **keywords)
    assert not np.array_equal(plain[0, :12], free[0, :12])
    for drafter in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model, "num_assistant_tokens": 3}):
        seen.clear()
        ours = jaxgen.generate(model, prompts, **keywords, **drafter)
        np.testing.assert_array_equal(ours, plain)
        assert {rows for rows, _ in seen} == {1}  # a text at a time


def test_an_error_on_the_host_comes_back_as_it_is(model: Any) -> None:
    def fails(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        jaxgen.generate(model, PROMPT, assistant_model=model, logits_processor=[fails], max_new_tokens=4)


@pytree
@dataclass(frozen=True)
class Bad(jaxgen.Drafter[tuple[()]]):
    """Returns what it is told to, in place of a draft."""

    returned: Any
    most_tokens: int = field(metadata={"static": True})

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: tuple[()]) -> Any:
        if self.returned is None:
            return None
        rows = len(texts.lengths)
        return jaxgen.Draft(jnp.broadcast_to(self.returned, (rows, *self.returned.shape)), limits, memory)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "a drafter returned NoneType, but must return a `jaxgen.Draft`"),
        (np.zeros(2, np.int32), r"`tokens` of shape \(1, 2\) and dtype int32, but it must be int32 of shape \(1, 3\)"),
        (np.zeros(3, np.float32), "dtype float32"),
    ],
)
def test_what_is_no_draft_is_refused(returned: Any, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, PROMPT, assistant_model=Bad(returned, 3), max_new_tokens=4)


def test_drafted_tokens_that_are_none_are_not_looked_up(model: Any) -> None:
    def knows(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert input_ids.max() < 97
        return scores

    keywords = {"max_new_tokens": 9, "eos_token_id": None}
    for token in (97, -1, 2**31 - 1):
        drafter = Bad(np.array([5, token, 5], np.int32), 3)
        ours = jaxgen.generate(model, PROMPT, assistant_model=drafter, logits_processor=[knows], **keywords)
        np.testing.assert_array_equal(ours, jaxgen.generate(model, PROMPT, **keywords))


def test_a_trie_is_not_asked_about_texts_that_it_forbids(model: Any) -> None:
    after = {token: [(token * 5 + 1) % 97, (token * 3 + 2) % 97] for token in range(97)}

    def trie(prompt: int, tokens: np.ndarray) -> list[int]:
        for before, following in zip(tokens[3:-1].tolist(), tokens[4:].tolist(), strict=True):
            assert following in after[before], "outside the trie"
        return after[int(tokens[-1])]

    keywords = {"max_new_tokens": 12, "eos_token_id": None, "prefix_allowed_tokens_fn": trie}
    plain = jaxgen.generate(model, PROMPT, **keywords)
    for drafts in ({"assistant_model": model}, {"assistant_model": Bad(np.array([7, 8, 9], np.int32), 3)}):
        np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, **keywords, **drafts), plain)


def test_functions_that_hold_numbers_for_each_row_are_refused(model: Any) -> None:
    prompts, bias = np.array([[5, 9, 17], [6, 13, 8]]), np.random.default_rng(0).normal(size=(2, 97)).astype(np.float32)
    keywords = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 5, "eos_token_id": None}
    for more, message in (
        ({"logits_processor": [lambda input_ids, scores, cur_len: scores + bias]}, "for one row"),
        (
            {"stopping_criteria": [lambda input_ids, scores, cur_len: cur_len >= jnp.array([4, 5])]},
            "2 answers for one row",
        ),
        (
            {"logits_processor": [lambda input_ids, scores: scores + bias]},
            "In assisted decoding it gets one row at a time",
        ),
    ):
        jaxgen.generate(model, prompts, **{**keywords, "prompt_lookup_num_tokens": None}, **more)
        with pytest.raises(ValueError, match=message):
            jaxgen.generate(model, prompts, **keywords, **more)


def test_any_drafter_drafts_for_a_model_with_an_encoder_but_a_model_without_one(model: Any) -> None:
    speller, ids = jaxgen.from_config(encoder_decoder(30).config, key=0), [[5, 6, 7, 8]]
    plain = jaxgen.generate(speller, ids, max_new_tokens=8)
    drafter = Bad(np.array([7, 8, 9], np.int32), 3)
    np.testing.assert_array_equal(jaxgen.generate(speller, ids, max_new_tokens=8, assistant_model=drafter), plain)
    with pytest.raises(ValueError, match=r"`assistant_early_exit`=1: .* is for models without an encoder"):
        jaxgen.generate(speller, ids, max_new_tokens=8, assistant_early_exit=1)
    for one, other in ((model, speller), (speller, model)):
        with pytest.raises(ValueError, match=r"Pass an assistant of the model's kind"):
            jaxgen.generate(one, ids, max_new_tokens=8, assistant_model=other)

"""Prompt lookup: what it proposes for a text, place by place. `assisted` checks it, whatever it is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.decoding.drafters import Chosen, PromptLookup, Texts

#                        0  1  2  3  4  5  6  7  8  9
TEXT = np.array([[5, 6, 7, 1, 5, 6, 2, 8, 5, 6, 0, 0], [9, 9, 3, 4, 9, 9, 0, 0, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([10, 6], np.int32)


def no_logits(texts: Texts, logits: jax.Array) -> Chosen:
    raise AssertionError("lookup has no logits")


def drafted(lookup: PromptLookup, text: np.ndarray = TEXT, lengths: np.ndarray = LENGTHS) -> list[list[int]]:
    texts = Texts(jnp.asarray(text), jnp.asarray(lengths), ())
    prompt = jaxgen.Prompt(text, np.ones_like(text, bool), 0, len(text))
    tokens, count, _ = lookup.draft(texts, jnp.full(len(text), 9), no_logits, lookup.init(prompt, 1, text.shape[1]))
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(count), strict=True)]


def test_the_last_place_with_the_longest_match_is_continued() -> None:
    """5 6 was followed by 7 1 5 first and by 2 8 5 later; 9 9 by 3 4 9."""
    assert drafted(PromptLookup(3, 2, 3, 4)) == [[2, 8, 5], [3, 4, 9]]


def test_only_so_many_last_tokens_are_compared() -> None:
    """With one token the later 9 counts, which another 9 follows, and that is the end of the text."""
    assert drafted(PromptLookup(3, 1, 3, 4)) == [[2, 8, 5], [9, 9, 9]]


def test_a_continuation_that_reaches_the_end_goes_round() -> None:
    text = np.array([[1, 2, 3, 1, 2, 3, 1, 0, 0, 0]], np.int32)
    assert drafted(PromptLookup(5, 2, 5, 4), text, np.array([7], np.int32)) == [[2, 3, 1, 2, 3]]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_without_a_match_there_is_no_draft(length: int) -> None:
    text = np.array([[1, 2, 1, 1, 1, 1]], np.int32)
    assert drafted(PromptLookup(2, 2, 3, 4), text, np.array([length], np.int32)) == [[]]


def test_after_a_draft_that_was_wrong_it_waits_twice_as_long_unless_more_tokens_match() -> None:
    """The text goes on with 1 2 and then with something new every time, so that 1 2 is always found and never right."""
    lookup, text = PromptLookup(2, 2, 3, 4), np.zeros((1, 200), np.int32)
    memory = lookup.init(jaxgen.Prompt(text, np.ones_like(text, bool), 0, 1), 1, 200)
    length, tried = 0, []
    for number in range(40):
        text[0, length : length + 3] = (100 + number, 1, 2)
        length += 2 if number else 3  # a step adds one token; here only the length is looked at
        texts = Texts(jnp.asarray(text), jnp.asarray([length], jnp.int32), ())
        memory = replace(memory, lengths=jnp.asarray([length - 1], jnp.int32))
        _, count, memory = lookup.draft(texts, jnp.full(1, 9), no_logits, memory)
        tried.append(int(count[0]) > 0)
        length += 1
    assert [number for number, drafted in enumerate(tried) if drafted] == [1, 4, 9, 18, 35]
    # Four tokens that match are drafted for at once.
    text[0, length : length + 4] = text[0, length - 8 : length - 4]
    texts = Texts(jnp.asarray(text), jnp.asarray([length + 4], jnp.int32), ())
    memory = replace(memory, lengths=jnp.asarray([length + 3], jnp.int32))
    assert int(lookup.draft(texts, jnp.full(1, 9), no_logits, memory).num_tokens[0]) == 2

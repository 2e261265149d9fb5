"""Prompt lookup: what it proposes for a text, place by place. `assisted` checks it, whatever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.drafters import Chosen, PromptLookup, Texts

#                        0  1  2  3  4  5  6  7  8  9
TEXT = np.array([[5, 6, 7, 1, 5, 6, 2, 8, 5, 6, 0, 0], [9, 9, 3, 4, 9, 9, 0, 0, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([10, 6], np.int32)


def no_logits(texts: Texts, logits: jax.Array) -> Chosen:
    raise AssertionError("lookup has no logits")


def drafted(lookup: PromptLookup, text: np.ndarray = TEXT, lengths: np.ndarray = LENGTHS) -> list[list[int]]:
    texts = Texts(jnp.asarray(text), jnp.asarray(lengths), ())
    tokens, count, _ = lookup.draft(texts, jnp.full(len(text), 9), no_logits, ())
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

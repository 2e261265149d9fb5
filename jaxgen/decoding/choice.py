"""The choice of a token from scores: the most likely one, or a sample by Gumbel-max.

Sampled tokens are the highest scores after adding noise that depends on the row's key, the step and the token id only.
So a sample is the same whether it is drawn from the whole vocabulary or from the few candidates that the warpers keep.
It does not depend on other rows and steps either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import LogitsProcessor, step_buffers
from jaxgen.decoding.gumbel import gumbel
from jaxgen.processors.logits_process import TopK, TopP, Warper
from jaxgen.processors.top_k import blocked_argmax, blocked_top_k, row_maxima
from jaxgen.pytree import pytree

WINDOW = 64  # candidates of a sample; more than the usual top_k of 50


class Warpers(NamedTuple):
    """A TopK and the warpers after it, which may run on a few candidates."""

    top_k: TopK
    others: list[Warper]


class Choice(NamedTuple):
    """The tokens of a step.

    Attributes:
        tokens: int32 [N].
        log_p: float32 [N]. Their log-probabilities under the processed scores; zeros unless asked for.
        invalid: bool [N]. Rows with a NaN, an infinity, or no finite score.
    """

    tokens: jax.Array
    log_p: jax.Array
    invalid: jax.Array


def split_warpers(
    processors: tuple[LogitsProcessor, ...], sampled: bool, outputs: Sequence[str]
) -> tuple[tuple[LogitsProcessor, ...], Warpers | None]:
    """The processors that need the whole vocabulary, and a TopK with only warpers after it, which do not.

    Greedy decoding has no warpers, and recorded scores are of the whole vocabulary: then all processors need it.
    """
    if sampled and "scores" not in outputs:
        for index, processor in enumerate(processors):
            warpers = [each for each in processors[index + 1 :] if isinstance(each, Warper)]
            if isinstance(processor, TopK) and len(warpers) == len(processors) - index - 1:
                return processors[:index], Warpers(processor, warpers)
    return processors, None


def choose(
    logits: jax.Array,
    scores: jax.Array,
    keys: jax.Array | None,
    step: jax.Array,
    finished: jax.Array,
    warpers: Warpers | None = None,
    with_log_p: bool = False,
    vocab_shards: int = 1,
) -> Choice:
    """One token per row: of equal scores the one with the lowest id.

    Args:
        logits: float32 [N, V], before all processors, since a processor may remove a NaN.
        scores: float32 [N, V], after all processors but the `warpers`.
        keys: uint32 [N, 2], or None to take the highest score.
        step: int32 [], or [N, 1] if rows are at different steps. The number of new tokens before this one.
        finished: bool [N]. Rows that may get any token.
        warpers: applied only to the candidates if these are certain to hold the sample.
        with_log_p: whether log-probabilities are needed.
        vocab_shards: the number of devices that V is sharded over, static.
    """

    def pick(scores: jax.Array, token_ids: jax.Array | None = None) -> Choice:
        """From scores [N, V], or from scores [N, W] of these token ids."""
        noisy = scores
        if keys is not None:
            noisy_ids = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape) if token_ids is None else token_ids
            noisy = scores + gumbel(keys, step, noisy_ids)
        if token_ids is None:
            tokens = best = blocked_argmax(noisy)
        else:  # candidates are unordered; of equal scores the lowest id wins, as in an argmax over [N, V]
            equal = noisy == noisy.max(axis=1, keepdims=True)
            best = jnp.argmin(jnp.where(equal, token_ids, jnp.iinfo(jnp.int32).max), axis=1)
            tokens = jnp.take_along_axis(token_ids, best[:, None], axis=1)[:, 0].astype(jnp.int32)
        chosen = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        log_p = chosen - jax.nn.logsumexp(scores, axis=1) if with_log_p else jnp.zeros_like(chosen)
        # In torch and in JAX, argmax treats NaN as the highest score. So the chosen score shows whether there is one.
        return Choice(tokens, log_p, ~jnp.isfinite(chosen))

    if warpers is None:
        choice = pick(scores)
        if keys is None:
            return choice
        return choice._replace(invalid=choice.invalid | ~jnp.isfinite(row_maxima(logits, vocab_shards)))

    def pick_from_all(scores: jax.Array) -> Choice:
        for warper in (warpers.top_k, *warpers.others):
            scores = warper.warp(scores)
        return pick(scores)

    candidates = _candidates(scores, warpers.top_k, warpers.others, finished, vocab_shards)
    choice = lax.cond(
        candidates.complete,
        lambda: pick(candidates.scores, candidates.token_ids),
        lambda: pick_from_all(scores),
    )
    return choice._replace(invalid=choice.invalid | candidates.invalid)


def output_buffers(outputs: Sequence[str], rows: int, vocab_size: int, steps: int) -> dict[str, jax.Array]:
    """Buffers of zeros for the outputs of each step: scores and logits [steps, N, V], log-probabilities [steps, N]."""
    per_token = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    shapes = {"scores": per_token, "logits": per_token, "logprobs": per_row, "processed_logprobs": per_row}
    return step_buffers([*outputs, *(["processed_logprobs"] if "logprobs" in outputs else [])], steps, shapes)


@pytree
@dataclass(frozen=True)
class _Candidates:
    """The tokens that may be sampled, in no particular order.

    Attributes:
        scores: float32 [N, W], warped.
        token_ids: int32 [N, W].
        complete: bool []. Whether all other tokens have probability 0, in every row.
        invalid: bool [N]. Rows with a NaN, an infinity or no finite score.
    """

    scores: jax.Array
    token_ids: jax.Array
    complete: jax.Array
    invalid: jax.Array


def _candidates(
    scores: jax.Array, top_k: TopK, warpers: list[Warper], finished: jax.Array, vocab_shards: int
) -> _Candidates:
    """Warps only the W highest scores, and tells whether they were enough.

    They are enough if top_k is at most W and no token outside has the same score as the last one inside, or if all
    tokens outside together are too unlikely for top_p. Sorting a vocabulary of 128k takes XLA:CPU 190 ms at batch 8;
    finding its 64 highest scores takes 0.6 ms.

    ```
    scores, highest first   9 8 8 7 6 6 | 6 5 4 ...     W = 6, edge = 6
    top_k = 4                     ^ last = 7            complete: edge < last
    top_k = 5                       ^ last = 6          not complete: 6 is also outside, and TopK keeps equal scores
    ```
    """
    vocab_size = scores.shape[1]
    window = min(WINDOW, vocab_size)
    nucleus = TopP(jnp.float32(1))  # keeps all tokens
    if warpers and isinstance(first := warpers[0], TopP):
        nucleus, warpers = first, warpers[1:]
    top_p = nucleus.top_p
    limited = top_k.top_k <= window

    values, token_ids, invalid = blocked_top_k(scores, window, vocab_shards)
    # The k-th highest score; only used if top_k is within the window.
    last = lax.dynamic_slice_in_dim(values, jnp.clip(top_k.top_k, 1, window) - 1, 1, axis=1)
    edge = values[:, -1:]

    def outside(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether no score outside equals the edge, and the logsumexp of the scores outside, each [N, 1]."""
        rest = jax.nn.logsumexp(jnp.where(scores < edge, scores, -jnp.inf), axis=1, keepdims=True)
        return (scores >= edge).sum(axis=1, keepdims=True) <= window, rest

    def nothing_outside(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same if only top_k applies, without reading all scores."""
        separate = (edge < last) | (last == -jnp.inf) | (window == scores.shape[1])
        return separate, jnp.full_like(edge, -jnp.inf)

    separate, rest = lax.cond(limited | (top_p >= 1), nothing_outside, outside, scores)
    total = jnp.logaddexp(jax.nn.logsumexp(values, axis=1, keepdims=True), rest)
    enough = limited | ((top_k.top_k >= vocab_size) & (top_p < 1) & (jnp.exp(rest - total) <= 1 - top_p))
    # Finished and invalid rows may take any token, so that they do not send the whole batch to the slow path.
    complete = (separate & enough)[:, 0] | finished | invalid

    if warpers:  # they break ties by the order of the token ids
        token_ids, values = lax.sort((token_ids, values), dimension=1, num_keys=1)
    values = jnp.where(limited & (values < last), -jnp.inf, values)
    values = nucleus.keep_nucleus(values, rest, token_ids)
    for warper in warpers:
        values = warper.warp(values)
    return _Candidates(values, token_ids, complete.all(), invalid)

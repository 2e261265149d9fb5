"""The decode loop: prefill -> advance (one `lax.while_loop`) -> finalize.

The weights, the strategy and the state are pytrees and arguments of the programs, so the compile key is their structure
and shapes. A new temperature, set of eos ids or length is new data for the same program.

`decode` composes the three as a pure function, for use inside the caller's own `jit`, `vmap` or `shard_map`. `generate`
dispatches the jitted `prefill` and `advance`. A new prompt bucket then recompiles the prefill only, and calls of any
length share `advance`, since the number of steps is traced. Between chunks of steps the cache may `grow`: attention
reads all slots, so a cache with room for the longest text would make every step as slow as the last one.
"""

import functools
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.base import (
    ENCODER_INTERMEDIATES,
    MORE_COLUMNS,
    AnyCache,
    BranchedCache,
    Cache,
    Call,
    EncoderDecoderModel,
    Intermediates,
    Model,
    Prefill,
    RaggedCache,
    Strategy,
    StrategyState,
    empty_cache,
    no_mesh,
)
from jaxgen.decoding.columns import extend_by_columns
from jaxgen.pytree import pytree

logger = logging.getLogger(__name__)


@pytree
@dataclass(frozen=True)
class DecodeState:
    """The carry of the loop: the model's cache, the state of the strategy, and the intermediates asked for.

    Attributes:
        cache: the model's cache, for all of its rows.
        inner: the state of the strategy.
        steps: int32 []. The number of forward passes after the prompt's.
        guidance_scale: float32 [], or None. With guidance the model has 2N rows: each row with its prompt, and again
            with its negative prompt. Both get the same new tokens:

            ```
            model's row     0      1      2       3                4                5
                            row 0  row 1  row 2   row 0, negative  row 1, negative  row 2, negative
            ```

            The strategy has only the first N rows, with guided scores.
        prompt_intermediates: those of the prompt's forward pass, as `Model.extend` returns them.
        step_intermediates: those of the later forward passes, in buffers with a leading axis of steps.
    """

    cache: Cache
    inner: StrategyState
    steps: jax.Array
    guidance_scale: jax.Array | None
    prompt_intermediates: Intermediates
    step_intermediates: Intermediates


@pytree
@dataclass(frozen=True)
class Progress:
    """Arrays for the host to read while further steps run. The state itself is donated to those steps.

    Attributes:
        length: int32 []. Columns of the prompt and the tokens of all steps so far.
        unfinished: bool []. Whether any row needs another token.
        text: int32 [N, S]. The prompts and their tokens so far; None if later steps may change them, as with beams.
        full: bool []. Whether the cache has no room for another step; None if the host can count its slots.
    """

    length: jax.Array
    unfinished: jax.Array
    text: jax.Array | None
    full: jax.Array | None = None


def decode(model: Model, call: Call) -> Mapping[str, jax.Array]:
    """Decodes until every row is finished, as a pure function without a jit inside.

    Args:
        model: the weights, a pytree.
        call: a pytree from `prepare`, or built from a `Prompt`, a strategy and a number of slots.

    Returns:
        The strategy's outputs: `sequences`, int32 [N, S], or [B, C, S] with beams, of which the first `length` columns
        are valid, and others that depend on the strategy.

    Raises:
        ValueError: if `slots` leaves no room for a token.
    """
    columns = call.prompt.input_ids.shape[1]
    if call.slots <= columns:
        raise ValueError(
            f"`slots`={call.slots} leaves no room for new tokens after a prompt of {columns} columns. Pass a larger "
            "number."
        )
    with no_mesh():
        call = jax.tree.map(jnp.asarray, call)  # a tracer cannot index NumPy arrays
        strategy, new_tokens = call.strategy, call.slots - columns
        n_steps = jnp.int32(strategy.forward_passes(new_tokens))
        if strategy.columns == 1:
            return finalize(strategy, _advance(model, _prefill(model, call), strategy, n_steps))
        # Holes take at most as many slots as the longest text.
        state = _prefill(model, call, cache_slots=2 * strategy.cache_slots(call.prompt_slots, new_tokens))
        return finalize(strategy, _advance_squeezing(model, state, strategy, n_steps))


def finalize(strategy: Strategy, state: DecodeState) -> Mapping[str, jax.Array]:
    """The outputs of a finished decode, by their Hugging Face names."""
    return strategy.finalize(state.inner)


def _prefill(
    model: Model, call: Call, intermediates: tuple[str, ...] = (), cache_slots: int | None = None
) -> DecodeState:
    """Runs the forward pass over the prompt and chooses the first token of every row.

    The cache has P slots during this pass, so that attention reads no empty slots. Afterwards it grows to
    `cache_slots`, by default the most that the strategy can need. Rows are repeated or branched only after the pass, so
    that several sequences of one prompt share it.
    """
    # The token buffer has S columns: P of the prompt in its bucket, the rest for new tokens.
    strategy, new_tokens = call.strategy, call.slots - call.prompt.input_ids.shape[1]
    slots = cache_slots or strategy.cache_slots(call.prompt_slots, new_tokens)
    reserved = slots if strategy.copies == 1 else call.prompt_slots
    logits, cache, computed = _read(model, call, _needed(intermediates, strategy), reserved)
    logits, scores, guided = _guided(strategy, call.guidance_scale, logits, computed)
    inner = strategy.start(call.prompt, call.slots, logits, scores, guided)
    # Copied while it has P slots and not yet S. Branches share the grown cache.
    if strategy.copies > 1:
        cache = cache.repeat(strategy.copies)
    cache = cache.grow(slots)
    if strategy.branches > 1:
        cache = cache.branch(strategy.branches)
    elif strategy.columns > 1:
        cache = cache.ragged()
        more = slots - call.prompt_slots + strategy.columns
        inner = strategy.with_caches(inner, tuple(each.grow(each.slots + more) for each in strategy.caches(inner)))
    buffers: Intermediates = {}
    if of_steps := _of_steps(intermediates):
        # The shapes of one step's intermediates depend on the cache as it is now: grown and branched.
        step = jax.eval_shape(lambda: _extend(model, cache, strategy, inner, call.guidance_scale, of_steps)[2])
        buffers = jax.tree.map(lambda x: jnp.zeros((new_tokens, *x.shape), x.dtype), step)
    prompt_intermediates = {name: computed[name] for name in intermediates}
    return DecodeState(cache, inner, jnp.int32(0), call.guidance_scale, prompt_intermediates, buffers)


def _read(
    model: Model, call: Call, intermediates: tuple[str, ...], slots: int
) -> tuple[jax.Array, Cache, Intermediates]:
    """The forward pass over the prompt, in one piece or in chunks; logits and intermediates are of the last chunk.

    With a source the encoder reads that first. Afterwards the cache is to grow to so many slots.
    """
    prefill, encoded = call.prefill, {}
    of_encoder = tuple(name for name in intermediates if name in ENCODER_INTERMEDIATES)
    intermediates = tuple(name for name in intermediates if name not in ENCODER_INTERMEDIATES)
    if prefill is None or prefill.past is None:
        cache: Cache = empty_cache(model, call.model_rows, call.prompt_slots, call.cache_backend)
        if prefill is None or prefill.chunk is None:
            cache = cache.reserve(slots)
    else:
        cache = prefill.past
    if call.source is not None:
        cache, encoded = cast(EncoderDecoderModel, model).read(cache, call.source, of_encoder)
    if prefill is None:
        mask = call.prompt.attention_mask.astype(bool)
        logits, cache, computed = model.extend(cache, call.prompt.input_ids, mask, None, intermediates)
    elif (size := prefill.chunk) is None:
        cache = cache if prefill.padding is None else cache.skip(prefill.padding)
        mask = prefill.attention_mask.astype(bool)
        logits, cache, computed = model.extend(cache, prefill.inputs, mask, prefill.position_ids, intermediates)
    else:
        logits, cache, computed = _read_chunks(model, cache, prefill, size, intermediates)
    return logits, cache, computed | encoded


def _read_chunks(
    model: Model, cache: Cache, prefill: Prefill, size: int, intermediates: tuple[str, ...]
) -> tuple[jax.Array, Cache, Intermediates]:
    """The forward passes over chunks of `size` columns, the last one padded on the left.

    ```
    chunk             0            1            2       size = 4, full_chunks = 2, padding = 3
                  a  b  c  d   e  f  g  h   .  .  .  i
    cache slots   0  1  2  3   4  5  6  7   8  9 10 11  "." is not valid
    ```
    """
    padding, full_chunks = prefill.padding, prefill.full_chunks
    assert padding is not None and full_chunks is not None, "a prefill in chunks needs both"
    inputs, mask, position_ids = prefill.inputs, prefill.attention_mask.astype(bool), prefill.position_ids

    def chunk(number: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, Intermediates]:
        def part(columns: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(columns, number * size, size, axis=1)

        cache = cache.skip(jnp.where(number < full_chunks, 0, padding))
        return model.extend(cache, part(inputs), part(mask), part(position_ids), intermediates)

    # One loop over all chunks, so that the layers compile once. Its carry starts with zeros for the results of a chunk.
    logits, _, computed = jax.eval_shape(chunk, jnp.int32(0), cache)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (logits, computed))
    start = (zeros[0], cache, zeros[1])
    return lax.fori_loop(0, full_chunks + 1, lambda number, last: chunk(number, last[1]), start)


def _advance(
    model: Model, state: DecodeState, strategy: Strategy, n_steps: jax.Array, intermediates: tuple[str, ...] = ()
) -> DecodeState:
    """Runs up to `n_steps` (traced) more steps. Stops early once every row is finished or a ragged cache is full."""
    end = state.steps + n_steps  # `steps` counts over all chunks

    def unfinished(state: DecodeState) -> jax.Array:
        going = (state.steps < end) & strategy.unfinished(state.inner)
        return going if (full := _full(strategy, state)) is None else going & ~full

    def step(state: DecodeState) -> DecodeState:
        scale = state.guidance_scale
        logits, cache, computed = _extend(
            model, state.cache, strategy, state.inner, scale, _needed(_of_steps(intermediates), strategy)
        )
        write = functools.partial(lax.dynamic_update_index_in_dim, index=state.steps, axis=0)
        buffers = jax.tree.map(
            write, state.step_intermediates, {name: computed[name] for name in _of_steps(intermediates)}
        )
        inner = strategy.step(*_guided(strategy, scale, logits, computed), state.inner)
        # Each branch has written its column. Only now is it known which branches continue.
        if strategy.branches > 1:
            cache = _reordered(cache, strategy, inner, scale)
        elif strategy.columns > 1:
            dropped = strategy.read(state.inner).sum(axis=1, dtype=jnp.int32) - strategy.kept(inner)
            cache = cache.drop_last(_for_both_halves(dropped, scale))
        return DecodeState(cache, inner, state.steps + 1, scale, state.prompt_intermediates, buffers)

    return lax.while_loop(unfinished, step, state)


def _advance_squeezing(model: Model, state: DecodeState, strategy: Strategy, n_steps: jax.Array) -> DecodeState:
    """As `_advance` until all rows are finished. Whenever a cache is full, holes are squeezed out of the caches."""

    def advance(state: DecodeState) -> DecodeState:
        state = _advance(model, state, strategy, n_steps)
        others = tuple(cache.squeezed() for cache in strategy.caches(state.inner))
        inner = strategy.with_caches(state.inner, others)
        return replace(state, cache=cast(RaggedCache, state.cache).squeezed(), inner=inner)

    return lax.while_loop(lambda state: strategy.unfinished(state.inner), advance, state)


def _of_steps(intermediates: tuple[str, ...]) -> tuple[str, ...]:
    """The intermediates that every step has: those of the encoder belong to the prompt alone."""
    return tuple(name for name in intermediates if name not in ENCODER_INTERMEDIATES)


def _needed(intermediates: tuple[str, ...], strategy: Strategy) -> tuple[str, ...]:
    """The intermediates to compute: the ones to return and the ones that the strategy reads."""
    return tuple(dict.fromkeys((*intermediates, *strategy.needs)))


def _extend(
    model: Model,
    cache: Any,
    strategy: Strategy,
    inner: StrategyState,
    guidance_scale: jax.Array | None,
    intermediates: tuple[str, ...],
) -> tuple[jax.Array, Any, Intermediates]:
    """One forward pass over the strategy's tokens. With guidance the model has 2N rows.

    Returns:
        Logits, the cache (a `BranchedCache` or `RaggedCache` if `cache` is one), and intermediates.
    """
    tokens = _for_both_halves(inner.tokens, guidance_scale)
    if strategy.columns > 1:
        mask = _for_both_halves(strategy.read(inner), guidance_scale)
        return *extend_by_columns(model, cache, tokens, mask), {}
    columns = tokens.reshape(-1, cache.branches)
    return model.extend(cache, columns, jnp.ones_like(columns, bool), None, intermediates)


def _full(strategy: Strategy, state: DecodeState) -> jax.Array | None:
    """bool []. Whether a ragged cache has no room for another step; None for other caches, whose slots are counted."""
    if strategy.columns == 1:
        return None
    full = ~cast(RaggedCache, state.cache).has_room(strategy.columns)
    for cache in strategy.caches(state.inner):
        full |= ~cache.has_room(strategy.columns + MORE_COLUMNS)
    return full


def _reordered(
    cache: BranchedCache, strategy: Strategy, inner: StrategyState, guidance_scale: jax.Array | None
) -> BranchedCache:
    """The cache after a step, with every branch continuing the branch that the strategy chose for it."""
    if (parents := strategy.parents(inner)) is not None:
        cache = cache.reorder(_for_both_halves(parents, guidance_scale))
    if (chosen := strategy.chosen(inner)) is not None:
        cache = cache.keep(_for_both_halves(chosen, guidance_scale))
    return cache


def _for_both_halves(array: jax.Array, guidance_scale: jax.Array | None) -> jax.Array:
    """An array [N, ...] for the rows of the model: unchanged, or repeated with guidance, [2N, ...]."""
    return array if guidance_scale is None else jnp.concatenate([array, array])


def _guided(
    strategy: Strategy, guidance_scale: jax.Array | None, logits: jax.Array, intermediates: Intermediates
) -> tuple[jax.Array, jax.Array, Intermediates]:
    """The logits, the processors' input scores and the intermediates, for strategies that ignore guidance.

    Same as transformers 5.24 `UnbatchedClassifierFreeGuidanceLogitsProcessor`, except that the negative prompts are the
    lower half of the batch, so that the weights are read once.
    """
    if guidance_scale is None:
        return logits, jax.nn.log_softmax(logits) if strategy.log_probabilities else logits, intermediates
    # [2N, V] -> [N, V] of the prompts and [N, V] of the negative prompts.
    conditional, unconditional = jnp.split(jax.nn.log_softmax(logits), 2)
    scores = guidance_scale * (conditional - unconditional) + unconditional
    logits, intermediates = jax.tree.map(lambda array: array[: len(array) // 2], (logits, intermediates))
    return logits, scores, intermediates


_compile_counts: Counter[str] = Counter()


def compile_counts() -> dict[str, int]:
    """How many programs this process has built for `generate` so far: {"prefill": ..., "advance": ..., "grow": ...}.

    If a call does not change these numbers, it compiled nothing.
    """
    return {name: _compile_counts[name] for name in ("prefill", "advance", "grow")}


def _count(name: str) -> None:
    """Counts a program; called while it is traced, so once per program and not per call."""
    _compile_counts[name] += 1
    jax.monitoring.record_event("/jaxgen/compile")


@functools.partial(jax.jit, static_argnums=(2, 3))
def prefill(
    model: Model, call: Call, intermediates: tuple[str, ...] = (), cache_slots: int | None = None
) -> tuple[DecodeState, Progress]:
    """The first program of a call: reads the prompt and chooses the first token. See `_prefill`."""
    _count("prefill")
    state = _prefill(model, call, intermediates, cache_slots)
    return state, _progress(model, call.strategy, state)


# By default XLA makes a CUDA graph of the loop's body, and the host reads the condition after every step. With these
# kinds of commands the loop itself is part of the graph, and dispatch returns at once. Other devices have no graphs.
_GRAPH = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
_OPTION = "xla_gpu_enable_command_buffer"
COMPILER_OPTIONS = None if _OPTION in os.environ.get("XLA_FLAGS", "") else {_OPTION: _GRAPH}


# Donated, so that XLA writes the cache and the buffers in place.
@functools.partial(jax.jit, static_argnums=4, donate_argnums=1, compiler_options=COMPILER_OPTIONS)
def advance(
    model: Model, state: DecodeState, strategy: Strategy, n_steps: jax.Array, intermediates: tuple[str, ...] = ()
) -> tuple[DecodeState, Progress]:
    """The second program of a call: chooses up to `n_steps` more tokens. `state` is donated. See `_advance`."""
    _count("advance")
    state = _advance(model, state, strategy, n_steps, intermediates)
    return state, _progress(model, strategy, state)


def _progress(model: Model, strategy: Strategy, state: DecodeState) -> Progress:
    inner = state.inner
    progress = Progress(inner.cur_len, strategy.unfinished(inner), strategy.text(inner), _full(strategy, state))
    if model.mesh is None:
        return progress
    # Every process of the mesh can read it.
    return lax.with_sharding_constraint(progress, NamedSharding(model.mesh, PartitionSpec()))


@functools.partial(jax.jit, donate_argnums=0)
def squeeze(cache: RaggedCache) -> RaggedCache:
    """The same cache without holes. `cache` is donated."""
    _count("grow")
    return cache.squeezed()


@functools.partial(jax.jit, static_argnums=1)
def _grow(cache: AnyCache, slots: int) -> AnyCache:
    _count("grow")
    return cache.grow(slots)


def grow(cache: AnyCache, slots: int) -> AnyCache:
    """The same cache with `slots` slots. The arrays of the old one are deleted."""
    return cache.grow_by_parts(slots, _grow)


_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_built_at_last_look = 0


def drop_programs_if_many() -> None:
    """On Linux, drops all programs once the process uses half of the memory maps that it may have.

    On the CPU a program takes 300 to 800 maps. A process may have 65,530 by default, and XLA aborts the process when
    there are none left. Dropped programs are compiled again when they are needed.
    """
    global _built_at_last_look
    built = sum(_compile_counts.values())
    if built < _built_at_last_look + 8 or not _MAPS.exists():  # counting the maps takes milliseconds
        return
    _built_at_last_look = built
    used, most = _MAPS.read_bytes().count(b"\n"), int(_MOST_MAPS.read_text())
    if used > most // 2:
        logger.warning(
            "%d of the %d memory maps that Linux allows this process are in use, so jaxgen drops its programs. "
            "Calls with fewer different shapes and options compile less; `sysctl vm.max_map_count` raises the limit.",
            used,
            most,
        )
        jitted: Any = (prefill, advance, squeeze, _grow)  # jax does not declare `clear_cache`
        for function in jitted:
            function.clear_cache()

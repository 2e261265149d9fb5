"""The decode engine: prefill -> advance (one `lax.while_loop`) -> finalize.

Everything a call needs is an argument: the weights, the strategy and the state are pytrees, so the compile key is their
structure and shapes. A new temperature, stop set or length is new data for the same program.

`decode` is the pure composition, for use inside the caller's own `jit`, `vmap` or `shard_map`. `generate` dispatches
the jitted `prefill` and `advance`: a new prompt bucket then recompiles the prefill only, and the same `advance` serves
a whole call or a chunk of it, since the number of steps is traced.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass

from jaxgen.base import Cache, Model, Prompt, Strategy, StrategyState


@register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the loop carries: the model's cache and the strategy's own state."""

    cache: Cache
    inner: StrategyState


def decode(model: Model, prompt: Prompt, strategy: Strategy, slots: int) -> Mapping[str, jax.Array]:
    """Decodes until every row is finished, as a pure function without a jit inside.

    Args:
        model: the weights, a pytree.
        prompt: see `Prompt`; shapes [N, P].
        strategy: how tokens are chosen, a pytree; it also holds the maximum length.
        slots: S, static: P plus the most new tokens there is room for, whatever the strategy's maximum length.

    Returns:
        The strategy's outputs: `sequences` int32 [N, S], of which the first `length` columns count, and more by
        strategy.

    Raises:
        ValueError: if `slots` leaves no room for a token.
    """
    columns = prompt.input_ids.shape[1]
    if slots <= columns:
        raise ValueError(f"`slots`={slots} leaves no room after a prompt of {columns} columns. Pass a larger number.")
    state = _prefill(model, prompt, strategy, slots)
    return finalize(strategy, _advance(model, state, strategy, jnp.int32(slots - columns - 1)))


def finalize(strategy: Strategy, state: DecodeState) -> Mapping[str, jax.Array]:
    """The outputs of a decode that is over, by their Hugging Face names."""
    return strategy.finalize(state.inner)


def _prefill(model: Model, prompt: Prompt, strategy: Strategy, slots: int) -> DecodeState:
    """One forward pass over the prompt; the first token of every row is chosen.

    The prompt attends to its own columns only: the cache starts with P slots and grows to S afterwards.
    """
    cache = model.make_cache(*prompt.input_ids.shape)
    logits, cache = model.extend(cache, prompt.input_ids, prompt.attention_mask.astype(bool))
    return DecodeState(cache.grow(slots), strategy.step(logits, strategy.init(prompt, slots)))


def _advance(model: Model, state: DecodeState, strategy: Strategy, n_steps: jax.Array) -> DecodeState:
    """Chooses up to `n_steps` (traced) more tokens per row; stops early when every row is finished."""

    def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, steps = carry
        return (steps < n_steps) & strategy.unfinished(state.inner)

    def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, steps = carry
        tokens = state.inner.tokens[:, None]
        logits, cache = model.extend(state.cache, tokens, jnp.ones_like(tokens, bool))
        return DecodeState(cache, strategy.step(logits, state.inner)), steps + 1

    start = DecodeState(state.cache.cleared(), state.inner)
    return lax.while_loop(unfinished, step, (start, jnp.int32(0)))[0]


_compile_counts: Counter[str] = Counter()


def compile_counts() -> dict[str, int]:
    """How many programs this process has built for `generate` so far: {"prefill": ..., "advance": ...}.

    A call that leaves the figures alone compiled nothing.
    """
    return {"prefill": _compile_counts["prefill"], "advance": _compile_counts["advance"]}


def _counted_jit(name: str, function: Callable[..., DecodeState], **options: Any) -> Callable[..., DecodeState]:
    @functools.wraps(function)
    def traced(*args: Any) -> DecodeState:
        _compile_counts[name] += 1  # runs once per trace, not per call
        return function(*args)

    return jax.jit(traced, **options)


prefill = _counted_jit("prefill", _prefill, static_argnums=3)
advance = _counted_jit("advance", _advance, donate_argnums=1)

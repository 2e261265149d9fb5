"""Assisted calls whose drafts a test decides: right, wrong in places, or garbage."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prepared import prepared

from jaxgen.base import Model
from jaxgen.decoding.drafters import Choose, Draft, Drafter, Texts
from jaxgen.generation.api import undisturbed
from jaxgen.generation.outputs import GenerateDecoderOnlyOutput
from jaxgen.generation.running.driver import UNWATCHED, ChunkSchedule, collect, drive
from jaxgen.generation.trimming import to_output
from jaxgen.pytree import Int32, pytree


@pytree
@dataclass(frozen=True)
class Told(Drafter[tuple[()]]):
    """Drafts the next tokens of texts that are told in advance, int32 [N, S]."""

    texts: Int32
    most_tokens: int = field(metadata={"static": True})

    def draft(
        self,
        texts: Texts,
        limits: jax.Array,
        choose: Choose,
        memory: tuple[()],
    ) -> Draft[tuple[()]]:
        del limits, choose
        lengths = texts.lengths
        columns = lengths[:, None] + jnp.arange(self.most_tokens)[None]
        tokens = jnp.take_along_axis(self.texts, jnp.minimum(columns, self.texts.shape[1] - 1), axis=1)
        return Draft(tokens, jnp.full(len(lengths), self.most_tokens, jnp.int32), memory)


def told(texts: np.ndarray, rows: int, slots: int, wrong: float, rng: np.random.Generator, num_tokens: int) -> Told:
    """The texts as drafts for N rows of S columns, with this share of their tokens replaced."""
    drafts = np.zeros((rows, slots), np.int32)
    drafts[: len(texts), : texts.shape[1]] = texts[:, :slots]
    garbage = rng.integers(3, 20, drafts.shape)
    return Told(np.where(rng.random(drafts.shape) < wrong, garbage, drafts), num_tokens)


def assisted(
    model: Model,
    ids: Any,
    texts: np.ndarray | None,
    num_tokens: int,
    wrong: float = 0.0,
    seed: int = 0,
    schedule: ChunkSchedule = UNWATCHED,
    **keywords: Any,
) -> tuple[Any, dict[str, np.ndarray]]:
    """The output of an assisted call and the outputs of its strategy, with its steps and the slots it used.

    The drafts are these texts, a share of them `wrong`; with None, those of prompt lookup.
    """
    call = prepared(model, ids, prompt_lookup_num_tokens=num_tokens, **keywords)
    strategy: Any = call.call.strategy
    if texts is not None:
        rows = call.call.model_rows * strategy.copies
        rows = rows if call.call.guidance_scale is None else rows // 2
        drafter = told(texts, rows, call.call.slots, wrong, np.random.default_rng(seed), num_tokens)
        strategy = dataclasses.replace(strategy, drafter=drafter)
        call = dataclasses.replace(call, call=dataclasses.replace(call.call, strategy=strategy))
    with undisturbed(), call.host.registered():
        state = collect(drive(call, schedule))
        output = to_output(call, state)
        used = int(state.cache.valid.shape[1] - jnp.argmax(state.cache.valid[:, ::-1].any(axis=0)))
        counts = jax.device_get({**strategy.finalize(state.inner), "steps": state.steps})
    assert isinstance(output, np.ndarray | GenerateDecoderOnlyOutput)
    return output, {**counts, "used": used - call.call.prompt_slots, "slots": state.cache.slots}

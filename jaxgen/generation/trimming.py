"""From the state at the end of a decode to what `generate` returns: without buckets, in transformers' shapes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.decoding.loop import DecodeState, finalize
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.inputs import refuse_tracer
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.past_key_values import PastKeyValues

logger = logging.getLogger(__name__)

PerStep = tuple[tuple[np.ndarray, ...], ...]  # over steps, then over layers


def to_output(prepared: PreparedCall, state: DecodeState) -> np.ndarray | GenerateOutput:
    """What `generate` returns, from the state at the end of the decode; waits for the device.

    Copies are writable and do not keep a bucket alive.
    """
    outputs = finalize(prepared.call.strategy, state)
    refuse_tracer(outputs["length"])
    # `device_get` can be interrupted while the device works, `np.asarray` cannot.
    fetched = jax.device_get(dict(outputs))
    if fetched["invalid"].any():
        logger.warning(
            "The scores of rows %s held NaN or infinity: their tokens mean nothing. Check the weights, load as "
            "float32, or pass `remove_invalid_values=True`.",
            np.flatnonzero(fetched["invalid"]).tolist(),
        )
    mode, config = prepared.mode, prepared.config
    fields: dict[str, Any] = mode.texts(fetched, prepared.rows, prepared.prompt_length)
    if not config.return_dict_in_generate:
        return fields["sequences"]
    steps, rows = int(fetched["length"]) - prepared.prompt_length, prepared.rows * mode.sequences_per_prompt
    fields |= {name: fetched[name][:steps, :rows].copy() for name in ("scores", "logits") if name in fetched}
    fields |= {name: fetched[name][:rows, :steps].copy() for name in fetched if name.endswith("logprobs")}
    fields |= {name: _intermediates(name, prepared, fetched, state, steps) for name in prepared.collect}
    if config.use_cache:
        fields["cache"] = _past_key_values(prepared, state, steps)
    return mode.output(**fields)


def _past_key_values(prepared: PreparedCall, state: DecodeState, steps: int) -> PastKeyValues:
    rows, prompt = prepared.rows * prepared.call.strategy.copies, prepared.prompt_slots
    generated = prompt[-1] + 1 + prepared.mode.cached_steps(state.cache, prompt[-1] + 1, rows, steps - 1)
    return PastKeyValues(state.cache, _after(prompt, generated))


def _after(prompt_slots: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """int [N, C, M + T]: the slots int [M] of the prompt, then those of each text, int [N, C, T]."""
    prompts = np.broadcast_to(prompt_slots, (*generated.shape[:2], len(prompt_slots)))
    return np.concatenate([prompts, generated], axis=2)


def _intermediates(
    name: str, prepared: PreparedCall, fetched: Mapping[str, np.ndarray], state: DecodeState, steps: int
) -> PerStep:
    """Transformers' tuple over steps of tuples over layers, from the buffers and their buckets.

    Step 0 holds the prompt, or its last chunk, repeated for each text of it. Later steps hold one token per text: one
    per beam, or the chosen candidate of contrastive search. Attention is cut to the slots that hold a text's past:

    ```
    slots of a row     . . p p p | 0 1 2 | 3 4 5 | 6 7 8 | . .      3 beams, after 3 steps; "." is never attended
    beam 0 attends         p p p     1         5   6                its ancestors' slots: what is returned
    ```
    """
    first, later = jax.device_get((state.prompt_internals[name], state.step_internals[name]))
    mode, prompt_slots = prepared.mode, prepared.prompt_slots
    rows, texts = prepared.rows * prepared.call.strategy.copies, mode.sequences_per_prompt
    num_new, prefill = prepared.inputs.num_new, prepared.call.prefill
    if prefill is not None and prefill.chunk is not None:
        num_new = (num_new - 1) % prefill.chunk + 1
    attended = mode.attended_steps(fetched, rows, steps - 1) if name == "attentions" else []

    def prompt(array: np.ndarray) -> np.ndarray:
        """[B, T, D] or [B, Q, T, S], of all columns of the bucket, -> the same of the prompt's, for each text."""
        repeated = np.repeat(array[: prepared.rows], texts, axis=0)
        return repeated[:, :, -num_new:][..., prompt_slots] if name == "attentions" else repeated[:, -num_new:]

    def step(array: np.ndarray, step: int) -> np.ndarray:
        """[N, C, D] -> [N * C, 1, D], or [N, Q, C, S] -> [N * C, Q, 1, t], where only branches of the texts count."""
        array = array[:rows]
        if (branches := mode.branches_of_step(fetched, rows, step)) is not None:
            index = branches.reshape(rows, *[1] * (array.ndim - 3), -1, 1)
            array = np.take_along_axis(array, index, axis=-2)
        if name == "hidden_states":
            return array.reshape(-1, 1, array.shape[-1])
        slots = _after(prompt_slots, prompt_slots[-1] + 1 + attended[step])
        taken = np.take_along_axis(array, slots[:, None], axis=3)
        return taken.swapaxes(1, 2).reshape(-1, taken.shape[1], 1, taken.shape[3])

    own = (
        tuple(prompt(layer) for layer in first),
        *(tuple(step(layer[place], place) for layer in later) for place in range(steps - 1)),
    )
    if prepared.config.use_cache:
        return own
    return _of_the_whole_text(own, mode.lineages(fetched, rows, steps - 1))


def _of_the_whole_text(own: PerStep, lineages: Sequence[np.ndarray]) -> PerStep:
    """What a forward pass over the whole text, as transformers makes without a cache, gives at every step.

    A column sees nothing after it, so its numbers are those of the step that first read it. Without beams the steps are
    read-only views of the last one, since each holds all that came before.

    Args:
        own: of each step its new columns, per layer [N, T, D] or [N, Q, T, S].
        lineages: with beams, of each step but the first, int [t, N]: the rows of all steps up to it that its rows
            descend from.
    """
    layers, steps = len(own[0]), len(own)

    def whole(layer: int, lineage: Iterable[Any]) -> np.ndarray:
        parts = [own[0][layer], *(own[step + 1][layer][rows] for step, rows in enumerate(lineage))]
        if parts[0].ndim == 3:
            return np.concatenate(parts, axis=1)
        width = parts[-1].shape[3]
        return np.concatenate([np.pad(each, (*[(0, 0)] * 3, (0, width - each.shape[3]))) for each in parts], axis=2)

    if lineages:
        return own[0], *(tuple(whole(layer, lineage) for layer in range(layers)) for lineage in lineages)
    last = [whole(layer, [slice(None)] * (steps - 1)) for layer in range(layers)]
    for array in last:
        array.flags.writeable = False
    widths = [last[0].shape[-2] - steps + 1 + step for step in range(steps)]
    return tuple(
        tuple(array[:, :width] if array.ndim == 3 else array[:, :, :width, :width] for array in last)
        for width in widths
    )

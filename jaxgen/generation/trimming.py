"""Turns the final state of a decode into the outputs of `generate`: without bucket padding, in transformers' shapes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgen.base import ENCODER_INTERMEDIATES
from jaxgen.decoding.loop import DecodeState, finalize
from jaxgen.exchange import fetch
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.prompt.past_key_values import PastKeyValues

logger = logging.getLogger(__name__)

PerStep = tuple[tuple[np.ndarray, ...], ...]  # over steps, then over layers


def to_output(prepared: PreparedCall, state: DecodeState) -> np.ndarray | GenerateOutput:
    """The output of `generate`, from the final state of the decode. Waits for the device.

    Its arrays are copies: they are writable, and do not keep the padded arrays alive.
    """
    fetched = fetch(dict(finalize(prepared.call.strategy, state)))
    if fetched["invalid"].any():
        logger.warning(
            "Rows %s produced NaN or infinite scores; their tokens are not meaningful. Check the weights, load as "
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
    if config.use_cache:
        fields["cache"] = _past_key_values(prepared, state, steps)
    of_steps = [name for name in prepared.intermediates if name not in ENCODER_INTERMEDIATES]
    computed: dict[str, Any] = {name: _intermediates(name, prepared, fetched, state, steps) for name in of_steps}
    if prepared.inputs.source is None:
        return mode.output(**fields, **computed)
    fields |= {name if name == "cross_attentions" else f"decoder_{name}": each for name, each in computed.items()}
    return mode.encoder_decoder_output(**fields, **_of_encoder(prepared, state))


def _of_encoder(prepared: PreparedCall, state: DecodeState) -> dict[str, Any]:
    """The intermediates of the encoder: its own, or those that the caller passed with its output."""
    source = prepared.inputs.source
    assert source is not None
    asked = [f"encoder_{name}" for name in prepared.config.intermediates]
    if source.encoded:
        return {name: source.given[name] for name in asked if name in source.given}
    rows, columns = source.attention_mask.shape
    fetched = fetch({name: state.prompt_intermediates[name] for name in asked})

    def trimmed(array: np.ndarray) -> np.ndarray:
        """[N, X, D] or [N, Q, X, X] without the bucket's padding."""
        return (array[:rows, :columns] if array.ndim == 3 else array[:rows, :, :columns, :columns]).copy()

    return {name: tuple(trimmed(layer) for layer in layers) for name, layers in fetched.items()}


def _past_key_values(prepared: PreparedCall, state: DecodeState, steps: int) -> PastKeyValues:
    rows, token_slots = prepared.rows * prepared.call.strategy.copies, prepared.token_slots
    first = token_slots[-1] + 1
    # The model has not read the last step's token, so it is not in the cache.
    if prepared.call.strategy.columns > 1:
        return PastKeyValues(state.cache, _ragged_slots(prepared, fetch(state.cache.valid)[:rows], steps - 1))
    generated = first + prepared.mode.cached_steps(state.cache, first, rows, steps - 1)
    return PastKeyValues(state.cache, _after(token_slots, generated))


def _ragged_slots(prepared: PreparedCall, valid: np.ndarray, steps: int) -> np.ndarray:
    """int [N, 1, L + steps]: the slots of each row's tokens in a cache that has them in order, with holes between.

    ```
    valid             . 1 1 . 1 1 .      bool [N, S]
    attention mask    0 1 1 1 1          of the prompt and the tokens after it; masked columns get slot 0
    slots             0 1 2 4 5
    ```
    """
    copies = prepared.call.strategy.copies
    mask = np.repeat(prepared.inputs.attention_mask.astype(bool), copies, axis=0)
    mask = np.pad(mask, ((0, 0), (0, steps)), constant_values=True)
    slots = np.zeros(mask.shape, np.int64)
    for row, columns in enumerate(mask):
        slots[row, columns] = np.flatnonzero(valid[row])[: columns.sum()]
    return slots[:, None]


def _after(token_slots: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """int [N, C, L + steps]: the slots of the prompt, int [L], then the slots of each text, int [N, C, steps]."""
    prompts = np.broadcast_to(token_slots, (*generated.shape[:2], len(token_slots)))
    return np.concatenate([prompts, generated], axis=2)


def _intermediates(
    name: str, prepared: PreparedCall, fetched: Mapping[str, np.ndarray], state: DecodeState, steps: int
) -> PerStep:
    """A tuple over steps of tuples over layers, as in transformers, from the padded buffers.

    Step 0 holds the prompt, or its last chunk, repeated per text. Later steps hold one token per text: one per beam, or
    the chosen candidate in contrastive search. Attention is cut to the slots that a text attends to:

    ```
    slots of a row     . . p p p | 0 1 2 | 3 4 5 | 6 7 8 | . .      3 beams, after 3 steps; "." is never attended
    beam 0 attends to      p p p     1         5   6                its ancestors' slots, which are returned
    ```
    """
    first, later = fetch((state.prompt_intermediates[name], state.step_intermediates[name]))
    mode, token_slots = prepared.mode, prepared.token_slots
    rows, texts = prepared.rows * prepared.call.strategy.copies, mode.sequences_per_prompt
    num_new, prefill = prepared.inputs.num_new, prepared.call.prefill
    if prefill is not None and prefill.chunk is not None:
        num_new = (num_new - 1) % prefill.chunk + 1  # of the last chunk
    attended = mode.attended_steps(fetched, rows, steps - 1) if name == "attentions" else []
    source = prepared.inputs.source
    source_columns = 0 if source is None else source.attention_mask.shape[1]

    def prompt(array: np.ndarray) -> np.ndarray:
        """[B, T, D] or [B, Q, T, S], padded to the bucket -> the prompt's part of it, repeated per text."""
        repeated = np.repeat(array[: prepared.rows], texts, axis=0)
        if name == "cross_attentions":
            return repeated[:, :, -num_new:, :source_columns]
        return repeated[:, :, -num_new:][..., token_slots] if name == "attentions" else repeated[:, -num_new:]

    def step(array: np.ndarray, step: int) -> np.ndarray:
        """[N, C, D] -> [N * C, 1, D], or [N, Q, C, S] -> [N * C, Q, 1, slots], for the branches that are texts."""
        # Branches are the last axis but one: columns of hidden states, queries of attention.
        array = array[:rows]
        if (branches := mode.branches_of_step(fetched, rows, step)) is not None:
            index = branches.reshape(rows, *[1] * (array.ndim - 3), -1, 1)
            array = np.take_along_axis(array, index, axis=-2)
        if name == "hidden_states":
            return array.reshape(-1, 1, array.shape[-1])
        if name == "cross_attentions":
            return array[..., :source_columns].swapaxes(1, 2).reshape(-1, array.shape[1], 1, source_columns)
        slots = _after(token_slots, token_slots[-1] + 1 + attended[step])
        attention = np.take_along_axis(array, slots[:, None], axis=3)  # [N, Q, C, slots]
        return attention.swapaxes(1, 2).reshape(-1, attention.shape[1], 1, attention.shape[3])

    per_step = (
        tuple(prompt(layer) for layer in first),
        *(tuple(step(layer[index], index) for layer in later) for index in range(steps - 1)),
    )
    if prepared.config.use_cache:
        return per_step
    return _whole_texts(per_step, mode.lineages(fetched, rows, steps - 1), causal=name == "attentions")


def _whole_texts(per_step: PerStep, lineages: Sequence[np.ndarray], causal: bool) -> PerStep:
    """The intermediates of the whole text at every step, as transformers computes them without a cache.

    A token does not attend to later ones, so its values are from the step that first read it. Without beams the steps
    are read-only views of the last one, which holds all of them. Attention of step t, with a row per query:

    ```
    p p . .      the prompt, padded to the width of step t
    p p . .
    1 1 1 .      step 1
    2 2 2 2      step 2
    ```

    Args:
        per_step: the new tokens of each step, per layer [N, T, D] or [N, Q, T, S].
        lineages: with beams, for each step after the prompt, int [step, N]: the ancestor of each row at each step so
            far.
        causal: whether keys are the columns of the text too, and not those of a source.
    """
    layers, steps = len(per_step[0]), len(per_step)

    def whole(layer: int, lineage: Iterable[np.ndarray | slice]) -> np.ndarray:
        parts = [per_step[0][layer], *(per_step[step + 1][layer][rows] for step, rows in enumerate(lineage))]
        if parts[0].ndim == 3:
            return np.concatenate(parts, axis=1)
        width = parts[-1].shape[3]
        return np.concatenate([np.pad(each, (*[(0, 0)] * 3, (0, width - each.shape[3]))) for each in parts], axis=2)

    if lineages:
        return per_step[0], *(tuple(whole(layer, lineage) for layer in range(layers)) for lineage in lineages)
    last = [whole(layer, [slice(None)] * (steps - 1)) for layer in range(layers)]
    for array in last:
        array.flags.writeable = False
    # One more query per step, and for self-attention one more key.
    widths = [last[0].shape[-2] - steps + 1 + step for step in range(steps)]

    def until(array: np.ndarray, width: int) -> np.ndarray:
        return array[:, :width] if array.ndim == 3 else array[:, :, :width, : width if causal else None]

    return tuple(tuple(until(array, width) for array in last) for width in widths)

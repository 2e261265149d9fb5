"""Prompts as a program takes them: padded to their buckets, so that one program serves many shapes."""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxgen.base import Model, Prefill, Prompt, row_shards
from jaxgen.buckets import bucket, row_bucket
from jaxgen.generation.inputs import Inputs, counted_positions

_MIN_PROMPT_BUCKET = 16  # one program serves every short prompt; 16 columns cost hardly more than one
_RESERVED_CHUNK = 32  # a short turn of a conversation; of more columns XLA:CPU packs the weights anew at every product
_RESERVED_ANSWER = 256  # new tokens that a reserved cache is to hold; it grows for those beyond


def pad_to_buckets(model: Model, input_ids: np.ndarray, attention_mask: np.ndarray, least: int = 0) -> Prompt:
    """The prompt in the upper right corner of its bucket: masked columns before it, finished rows below it.

    The bucket has at least `least` columns.
    """
    rows, columns = input_ids.shape
    width = (
        (0, row_bucket(row_shards(model.mesh), rows) - rows),
        (bucket(max(columns, least, _MIN_PROMPT_BUCKET)) - columns, 0),
    )
    return Prompt(
        input_ids=np.pad(input_ids, width),
        attention_mask=np.pad(attention_mask, width),
        length=columns,
        rows=rows,
    )


def padded_prompt(
    model: Model, inputs: Inputs, chunk: int | None, reserve: int, new_tokens: int
) -> tuple[Prompt, Prefill | None, np.ndarray]:
    """The prompt in its buckets, what the model reads of it, and int [M], the cache slots of its columns after that.

    With `reserve` the shapes depend on the size of the cache alone, whatever comes from it and whatever is new: a
    conversation needs one program until its cache is full.

    Args:
        model: that reads it.
        inputs: of the call.
        chunk: `prefill_chunk_size`.
        reserve: slots that the cache has at least, from the start; 0 for as many as the prompt needs.
        new_tokens: for which reserved slots should be enough, too.
    """
    num_new = inputs.num_new
    if reserve:
        chunk = chunk or _RESERVED_CHUNK
    elif chunk is not None and chunk >= num_new:
        chunk = None
    if inputs.plain and chunk is None:
        prompt = pad_to_buckets(model, inputs.input_ids, inputs.text_mask)
        width = prompt.input_ids.shape[1]
        return prompt, None, np.arange(width - num_new, width)
    cached = inputs.attention_mask.shape[1] - num_new
    size = bucket(max(num_new, _MIN_PROMPT_BUCKET)) if chunk is None else chunk
    # Chunks as transformers cuts them: full ones, and what is left. That one is padded on the left, so that all are of
    # one size. 7 columns in chunks of 3, behind 2 in the cache:
    #
    #     column      0 1 | 2 3 4 | 5 6 7 | . . 8
    #     slot        0 1 | 2 3 4 | 5 6 7 | 8 9 10
    full = (num_new - 1) // size
    padding = (full + 1) * size - num_new
    places = np.arange(num_new) + np.where(np.arange(num_new) < full * size, 0, padding)
    if reserve:
        needed = cached + (full + 1) * size + min(new_tokens, _RESERVED_ANSWER)
        reserve = max(reserve, 1 << (needed - 1).bit_length())
        width = -(-reserve // size) * size
    else:
        width = size * (1 + (bucket(full) if full else 0))
    prompt = pad_to_buckets(model, inputs.input_ids, inputs.text_mask, reserve)
    rows = len(prompt.input_ids)

    def laid_out(array: np.ndarray) -> Any:
        """[N, T, ...] of [B, columns to be read, ...]."""
        whole = np.zeros((rows, width, *array.shape[2:]), array.dtype)
        whole[: len(array), places] = array
        return whole

    positions = inputs.position_ids
    if positions is None:
        positions = counted_positions(inputs.attention_mask)[:, -num_new:]
    past = None
    if inputs.past is not None:
        past = inputs.past.to_cache(model, rows, reserve or bucket(cached + width), inputs.attention_mask[:, :cached])
    elif reserve:
        past = model.make_cache(rows, reserve)
    shift: Any = padding
    chunks: Any = None if chunk is None else full
    prefill = Prefill(
        inputs=laid_out(inputs.input_ids[:, -num_new:] if inputs.embeddings is None else inputs.embeddings),
        attention_mask=laid_out(inputs.attention_mask[:, -num_new:]),
        position_ids=laid_out(positions),
        past=past,
        padding=shift,
        full_chunks=chunks,
        chunk=chunk,
    )
    return prompt, prefill, np.concatenate([np.arange(cached), cached + places])


def guided_prompt(
    model: Model, inputs: Inputs, negative_ids: np.ndarray, negative_mask: np.ndarray, guidance_scale: float
) -> tuple[Prompt, Prefill, np.ndarray]:
    """As `padded_prompt`, with negative prompts [B, P'] below the others: one batch, whose weights are read once."""
    width = max(inputs.input_ids.shape[1], negative_ids.shape[1])

    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (width - array.shape[1], 0)))

    prompt, negative = (
        pad_to_buckets(model, widen(ids), widen(mask))
        for ids, mask in ((inputs.input_ids, inputs.text_mask), (negative_ids, negative_mask))
    )
    # Transformers counts the positions of a prompt by its mask, but those of a negative prompt by its columns.
    by_mask = counted_positions(np.asarray(prompt.attention_mask))
    by_column = np.maximum(np.arange(by_mask.shape[1]) - by_mask.shape[1] + negative_ids.shape[1], 0)
    ids: Any = np.concatenate([prompt.input_ids, negative.input_ids])
    scale: Any = guidance_scale
    prefill = Prefill(
        inputs=ids,
        attention_mask=np.concatenate([prompt.attention_mask, negative.attention_mask]),
        position_ids=np.concatenate([by_mask, np.broadcast_to(by_column, by_mask.shape)]),
        guidance_scale=scale,
    )
    length, columns = inputs.input_ids.shape[1], prompt.input_ids.shape[1]
    return replace(prompt, length=length), prefill, np.arange(columns - length, columns)

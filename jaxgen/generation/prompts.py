"""Prompts as a program takes them: padded to their buckets, so that one program serves many shapes."""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxgen.base import Model, Prompt, row_shards
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
    model: Model, inputs: Inputs, chunk: int | None, reserve: int = 0, new_tokens: int = 0
) -> tuple[Prompt, np.ndarray]:
    """The prompt in its buckets, and int [M], the slots of the cache in which its columns are after the forward pass.

    With `reserve` the shapes depend on the size of the cache alone, whatever comes from it and whatever is new: a
    conversation needs one program until its cache is full.

    Args:
        model: that reads it.
        inputs: of the call.
        chunk: `prefill_chunk_size`.
        reserve: slots that the cache has at least, from the start; 0 for as many as the prompt needs.
        new_tokens: for which reserved slots should be enough, too.
    """
    fresh, seen = inputs.fresh, inputs.attention_mask.shape[1] - inputs.fresh
    if reserve:
        chunk = chunk or _RESERVED_CHUNK
    elif chunk is not None and chunk >= fresh:
        chunk = None
    if inputs.plain and chunk is None:
        prompt = pad_to_buckets(model, inputs.input_ids, inputs.text_mask)
        width = prompt.input_ids.shape[1]
        return prompt, np.arange(width - fresh, width)
    size = bucket(max(fresh, _MIN_PROMPT_BUCKET)) if chunk is None else chunk
    full = (fresh - 1) // size  # chunks before the last, which has what is left, as in transformers
    padding = (full + 1) * size - fresh  # of the last chunk
    places = np.arange(fresh) + np.where(np.arange(fresh) < full * size, 0, padding)
    if reserve:
        needed = seen + (full + 1) * size + min(new_tokens, _RESERVED_ANSWER)
        reserve = max(reserve, 1 << (needed - 1).bit_length())
        width = -(-reserve // size) * size
    else:
        width = size * (1 + (bucket(full) if full else 0))
    prompt = pad_to_buckets(model, inputs.input_ids, inputs.text_mask, reserve)

    def laid_out(array: np.ndarray) -> np.ndarray:
        """[N, T, ...] of [B, fresh, ...]."""
        whole = np.zeros((len(prompt.input_ids), width, *array.shape[2:]), array.dtype)
        whole[: len(array), places] = array
        return whole

    positions = (
        inputs.position_ids if inputs.position_ids is not None else counted_positions(inputs.attention_mask)[:, -fresh:]
    )
    past = None
    if inputs.past is not None:
        slots = reserve or bucket(seen + width)
        past = inputs.past.lower(model, len(prompt.input_ids), slots, inputs.attention_mask[:, :seen])
    elif reserve:
        past = model.make_cache(len(prompt.input_ids), reserve)
    prompt = replace(
        prompt,
        position_ids=laid_out(positions),
        past=past,
        inputs=laid_out(inputs.input_ids[:, -fresh:] if inputs.embeddings is None else inputs.embeddings),
        unseen=laid_out(inputs.attention_mask[:, -fresh:]),
        full_chunks=None if chunk is None else full,
        padding=padding,
        chunk=chunk,
    )
    return prompt, np.concatenate([np.arange(seen), seen + places])


def with_negative_prompts(
    model: Model, inputs: Inputs, negative_ids: np.ndarray, negative_mask: np.ndarray, guidance_scale: float
) -> Prompt:
    """The prompts and below them the negative ones, each [B, P'], in one batch whose weights are read once."""
    columns = inputs.input_ids.shape[1]
    width = max(columns, negative_ids.shape[1])

    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (width - array.shape[1], 0)))

    guided, negative = (
        pad_to_buckets(model, widen(ids), widen(mask))
        for ids, mask in ((inputs.input_ids, inputs.text_mask), (negative_ids, negative_mask))
    )
    # Transformers counts the positions of a prompt by its mask, but those of a negative prompt by its columns.
    by_mask = counted_positions(np.asarray(guided.attention_mask))
    by_column = np.maximum(np.arange(by_mask.shape[1]) - by_mask.shape[1] + negative_ids.shape[1], 0)
    scale: Any = guidance_scale
    position_ids: Any = np.concatenate([by_mask, np.broadcast_to(by_column, by_mask.shape)])
    return Prompt(
        input_ids=np.concatenate([guided.input_ids, negative.input_ids]),
        attention_mask=np.concatenate([guided.attention_mask, negative.attention_mask]),
        length=columns,
        rows=guided.rows,
        position_ids=position_ids,
        guidance_scale=scale,
    )

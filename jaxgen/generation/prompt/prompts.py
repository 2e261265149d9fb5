"""Pads prompts to buckets, so that one program serves many shapes."""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxgen.base import Cache, Model, Prefill, Prompt, row_shards
from jaxgen.buckets import bucket, row_bucket
from jaxgen.generation.prompt.inputs import Inputs, counted_positions

_MIN_PROMPT_BUCKET = 16  # one program for all short prompts; 16 tokens take hardly longer than one
_RESERVED_CHUNK = 32  # a short turn of a conversation; for more, XLA:CPU packs the weights again at every matmul
_RESERVED_ANSWER = 256  # new tokens that a reserved cache has room for; for more, it grows


def pad_to_buckets(model: Model, input_ids: np.ndarray, attention_mask: np.ndarray, least: int = 0) -> Prompt:
    """The prompt at the top right of its bucket, which has at least `least` columns.

    ```
    . . . p p p      masked columns to the left of the B prompts
    . . . p p p
    . . . . . .      rows of the bucket, which are finished from the start
    ```
    """
    rows, length = input_ids.shape
    padding = (
        (0, row_bucket(row_shards(model.mesh), rows) - rows),
        (bucket(max(length, least, _MIN_PROMPT_BUCKET)) - length, 0),
    )
    return Prompt(
        input_ids=np.pad(input_ids, padding),
        attention_mask=np.pad(attention_mask, padding),
        length=length,
        rows=rows,
    )


def padded_prompt(
    model: Model, inputs: Inputs, chunk: int | None, reserve: int, new_tokens: int
) -> tuple[Prompt, Prefill | None, np.ndarray]:
    """The prompt in its bucket, the `Prefill` if the model reads more than these tokens, and int [L] cache slots.

    With `reserve`, all shapes depend only on the size of the cache, and not on how many tokens are cached or new. So a
    conversation needs one program until its cache is full.

    Args:
        model: the call's model.
        inputs: the call's checked prompt.
        chunk: `prefill_chunk_size`.
        reserve: minimum number of cache slots from the start; 0 for as many as the prompt needs.
        new_tokens: the number of tokens that reserved slots should also have room for.
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
    num_cached = inputs.attention_mask.shape[1] - num_new
    size = bucket(max(num_new, _MIN_PROMPT_BUCKET)) if chunk is None else chunk
    full, padding, offsets = _chunks(num_new, size)
    # The width of `Prefill`: enough chunks for the new tokens, or with `reserve` for all slots of the cache.
    if reserve:
        needed = num_cached + (full + 1) * size + min(new_tokens, _RESERVED_ANSWER)
        reserve = max(reserve, 1 << (needed - 1).bit_length())
        width = -(-reserve // size) * size
    else:
        width = size * (1 + (bucket(full) if full else 0))
    prompt = pad_to_buckets(model, inputs.input_ids, inputs.text_mask, reserve)
    rows = len(prompt.input_ids)

    def padded(array: np.ndarray) -> Any:
        """[B, T, ...] -> [N, width, ...] in chunks, zeros on padding."""
        chunks = np.zeros((rows, width, *array.shape[2:]), array.dtype)
        chunks[: len(array), offsets] = array
        return chunks

    # Numbers are traced, so their types are those of arrays.
    left_padding: Any = padding
    full_chunks: Any = None if chunk is None else full
    prefill = Prefill(
        inputs=padded(inputs.input_ids[:, -num_new:] if inputs.embeddings is None else inputs.embeddings),
        attention_mask=padded(inputs.attention_mask[:, -num_new:]),
        position_ids=padded(inputs.new_positions),
        past=_past(model, inputs, rows, reserve or bucket(num_cached + width), bool(reserve)),
        padding=left_padding,
        full_chunks=full_chunks,
        chunk=chunk,
    )
    return prompt, prefill, np.concatenate([np.arange(num_cached), num_cached + offsets])


def _chunks(num_new: int, size: int) -> tuple[int, int, np.ndarray]:
    """The number of full chunks, the padding of the last chunk, and int [T]: the new tokens' offsets."""
    # Chunks as transformers cuts them: full ones, then the rest, which is padded on the left to the same size. For 7
    # new tokens in chunks of 3, after 2 in the cache:
    #
    #     position    0 1 | 2 3 4 | 5 6 7 | . . 8
    #     slot        0 1 | 2 3 4 | 5 6 7 | 8 9 10
    #     offsets           0 1 2   3 4 5       8     of the new tokens from the first slot after the cache
    full = (num_new - 1) // size
    padding = (full + 1) * size - num_new
    offsets = np.arange(num_new) + np.where(np.arange(num_new) < full * size, 0, padding)
    return full, padding, offsets


def _past(model: Model, inputs: Inputs, rows: int, slots: int, reserved: bool) -> Cache | None:
    """The cache before the new tokens, with N rows and `slots` slots; None if nothing is cached or reserved."""
    if inputs.past is None:
        return model.make_cache(rows, slots) if reserved else None
    return inputs.past.to_cache(model, rows, slots, inputs.attention_mask[:, : -inputs.num_new])


def guided_prompt(
    model: Model, inputs: Inputs, negative_ids: np.ndarray, negative_mask: np.ndarray, guidance_scale: float
) -> tuple[Prompt, Prefill, np.ndarray]:
    """As `padded_prompt`, with negative prompts [B, P'] below the prompts in the same batch: weights are read once."""
    width = max(inputs.input_ids.shape[1], negative_ids.shape[1])

    # Both are padded on the left to one width, so that their last tokens are in the same column.
    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (width - array.shape[1], 0)))

    prompt, negative = (
        pad_to_buckets(model, widen(ids), widen(mask))
        for ids, mask in ((inputs.input_ids, inputs.text_mask), (negative_ids, negative_mask))
    )
    # transformers counts the positions of a prompt by its mask, but those of a negative prompt by its columns:
    # the first of its P' columns is at position 0.
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

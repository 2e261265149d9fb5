"""What callers pass, checked on the host and made ready for a program: prompts, masks, negative prompts and keys."""

import logging
import operator
import secrets
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgen.base import Model, Prompt, leaf
from jaxgen.generation_config import Resolved

logger = logging.getLogger(__name__)

_MIN_PROMPT_BUCKET = 16  # one program serves every short prompt; 16 columns cost hardly more than one


def bucket(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`: at most half as much again."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def prompt_arrays(
    model: Model, inputs: Any, model_inputs: dict[str, Any], config: Resolved
) -> tuple[np.ndarray, np.ndarray | None]:
    """The checked prompt, int32 [B, P], and the attention mask the caller gave, bool [B, P]."""
    if inputs is not None and model_inputs.get("input_ids") is not None:
        raise ValueError("`inputs` and `input_ids` were both passed, and they mean the same. Pass one of them.")
    given = model_inputs.get("input_ids") if inputs is None else inputs
    mask = model_inputs.get("attention_mask")
    if given is None:
        if config.bos_token_id is None:
            raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
        given = np.full((1 if mask is None else len(mask), 1), config.bos_token_id)
    input_ids = _token_ids("input_ids", given, model.vocab_size)
    return input_ids, None if mask is None else _mask("attention_mask", mask, input_ids)


def _token_ids(name: str, given: Any, vocab_size: int) -> np.ndarray:
    """int32 [B, P], each an id of the model."""
    ids = _array(name, given)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{name}` has dtype {ids.dtype}, but token ids are integers. Tokenise the text first.")
    if ids.size == 0:
        raise ValueError(f"`{name}` has shape {ids.shape}, but every prompt needs at least one token.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`{name}` holds {low if low < 0 else high}, but ids of this model are 0 to {vocab_size - 1}. "
            "Check that tokenizer and model belong together."
        )
    return ids.astype(np.int32)


def _mask(name: str, given: Any, ids: np.ndarray) -> np.ndarray:
    if np.ndim(given) > 2:
        raise ValueError(f"`{name}` passed to `generate` must be 2D, but has {np.ndim(given)} dimensions.")
    mask = _array(name, given)
    if mask.shape != ids.shape:
        raise ValueError(f"`{name}` has shape {mask.shape}, but its ids have {ids.shape}. They must be equal.")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"`{name}` holds {mask[~np.isin(mask, (0, 1))][0]}, but may hold 0 and 1 only.")
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        logger.warning("`%s` masks all of row %d: its continuation will mean nothing.", name, row)
    return mask.astype(bool)


def _array(name: str, given: Any) -> np.ndarray:
    refuse_tracer(given)
    if isinstance(given, Mapping):
        raise ValueError(f"`{name}` is a mapping of {list(given)}. Pass its parts: generate(model, **inputs).")
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ValueError(f"`{name}` is no rectangular array ({error}). Pad the rows to one length.") from error
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` has shape {array.shape}, but must be [prompts, tokens]. Wrap a single prompt in a list."
        )
    return array


def refuse_tracer(value: Any) -> None:
    if isinstance(value, Tracer):
        raise ValueError("`generate` runs on the host, not inside jit, vmap or grad. Use `jaxgen.decode` there.")


def warn_about_padding(input_ids: np.ndarray, mask: np.ndarray | None, config: Resolved) -> None:
    """The warnings of transformers 5.23 `_prepare_special_tokens` and `generate`, which concern batches only."""
    eos, pad = config.eos_token_id, config.pad_token_id
    if len(input_ids) == 1 or (pad is None and not eos):
        return
    if mask is None and pad is None:
        logger.warning(
            "The attention mask and the pad token id were not set, with a batched input. As a consequence, you may "
            "observe unexpected behavior. Please pass your input's `attention_mask` to obtain reliable results."
        )
    if mask is None and (pad is None or pad in eos):
        logger.warning(
            "The attention mask is not set with a batched input, and cannot be inferred from input because pad token "
            "is same as eos token. As a consequence, you may observe unexpected behavior. Please pass your input's "
            "`attention_mask` to obtain reliable results."
        )
    last = input_ids[:, -1] == pad_token_id_or_default(config) if mask is None else ~mask[:, -1]
    if last.any():
        logger.warning(
            "A decoder-only architecture is being used, but right-padding was detected! For correct generation "
            "results, please set `padding_side='left'` when initializing the tokenizer."
        )


def infer_attention_mask(input_ids: np.ndarray, config: Resolved) -> np.ndarray:
    """Without a mask, pad ids are padding, unless padding and the end of a text are the same id."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        return np.ones(input_ids.shape, bool)
    return input_ids != config.pad_token_id


def pad_token_id_or_default(config: Resolved) -> int:
    """`pad_token_id`, the first eos by default; without either, no row finishes early and none is padded."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_id[0] if config.eos_token_id else 0


def pad_to_buckets(input_ids: np.ndarray, attention_mask: np.ndarray) -> Prompt:
    """The prompt in the upper right corner of its bucket: masked columns before it, finished rows below it."""
    rows, columns = input_ids.shape
    width = ((0, bucket(rows) - rows), (bucket(max(columns, _MIN_PROMPT_BUCKET)) - columns, 0))
    return Prompt(
        input_ids=leaf(np.pad(input_ids, width), np.int32),
        attention_mask=leaf(np.pad(attention_mask, width), np.bool_),
        length=leaf(columns, np.int32),
        rows=leaf(rows, np.int32),
    )


def with_negative_prompts(
    model: Model, input_ids: np.ndarray, mask: np.ndarray, given_ids: Any, given_mask: Any
) -> Prompt:
    """The prompts and below them the negative ones, in one batch whose weights are read once."""
    rows, columns = input_ids.shape
    negative_ids, negative_mask = input_ids[:, -1:], np.ones((rows, 1), bool)
    if given_ids is not None:
        negative_ids = _token_ids("negative_prompt_ids", given_ids, model.vocab_size)
        if len(negative_ids) != rows:
            raise ValueError(f"`negative_prompt_ids` has {len(negative_ids)} rows, but there are {rows} prompts.")
        negative_mask = np.ones(negative_ids.shape, bool)
    if given_mask is not None:
        negative_mask = _mask("negative_prompt_attention_mask", given_mask, negative_ids)
    width = max(columns, negative_ids.shape[1])

    def widen(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (width - array.shape[1], 0)))

    guided, negative = (
        pad_to_buckets(widen(ids), widen(each)) for ids, each in ((input_ids, mask), (negative_ids, negative_mask))
    )
    # Transformers counts the positions of a prompt by its mask, but those of a negative prompt by its columns.
    by_mask = np.where(guided.attention_mask, np.cumsum(guided.attention_mask, axis=1) - 1, 0)
    by_column = np.maximum(np.arange(by_mask.shape[1]) - by_mask.shape[1] + negative_ids.shape[1], 0)
    return Prompt(
        input_ids=leaf(np.concatenate([guided.input_ids, negative.input_ids]), np.int32),
        attention_mask=leaf(np.concatenate([guided.attention_mask, negative.attention_mask]), np.bool_),
        length=leaf(columns, np.int32),
        rows=guided.rows,
        position_ids=leaf(np.concatenate([by_mask, np.broadcast_to(by_column, by_mask.shape)]), np.int32),
    )


def key_words(key: Any, config: Resolved, padded_rows: int, rows: int) -> Any:
    """uint32 [2], or [N, 2] of one key per prompt; None for greedy decoding."""
    if not config.do_sample:
        if key is not None:
            logger.warning("`key` has no effect without `do_sample=True`: nothing is drawn.")
        return None
    if key is None:
        key = secrets.randbits(64)
    refuse_tracer(key)
    advice = "Pass an int, a jax.random key, or one of either per prompt."
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(key))[..., :2]
    else:
        try:
            given = np.asarray(key)
            seeds = np.vectorize(operator.index, otypes=[object])(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`key`={key!r} is no key. {advice}") from error
        if given.dtype == np.uint32 and given.ndim and given.shape[-1] in (2, 4):  # jax.random.PRNGKey
            words = given[..., :2]
        else:
            words = np.stack([seeds >> 32 & 0xFFFFFFFF, seeds & 0xFFFFFFFF], axis=-1).astype(np.uint32)
    if words.shape not in ((2,), (rows, 2)):
        raise ValueError(f"`key` has shape {words.shape[:-1]}, but there are {rows} prompts. {advice}")
    return words if words.ndim == 1 else np.pad(words, ((0, padded_rows - rows), (0, 0)))

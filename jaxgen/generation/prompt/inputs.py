"""Checks the inputs of a call: prompts in all forms, masks, negative prompts and keys."""

import logging
import operator
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.base import Model
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.prompt.checks import (
    checked_embeddings,
    checked_mask,
    checked_token_ids,
    mask_array,
    refuse_tracer,
    two_dimensional,
)
from jaxgen.generation.prompt.past_key_values import PastKeyValues, cached_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from jaxgen.generation.prompt.source import SourceInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The checked prompt of a call.

    The model attends to L positions, which can differ from the P tokens of the text:

    ```
    L positions    c c c c | n n n     those in the cache, then T new ones, which the model reads
    P tokens       t t t t   t t t     the whole text, or
                             t t t     the new tokens only, or none with `inputs_embeds`
    ```

    Attributes:
        input_ids: int32 [B, P]. The text; P is 0 if there are embeddings only.
        text_mask: bool [B, P]. False on padding.
        attention_mask: bool [B, L].
        num_new: T, the number of prompt tokens not in the cache yet.
        position_ids: int32 [B, T], or None to count unmasked positions.
        embeddings: float [B, T, D], or None.
        past: the cache to continue, or None.
        source: the input of the encoder; then the prompt above is the decoder's. None without an encoder.
    """

    input_ids: np.ndarray
    text_mask: np.ndarray
    attention_mask: np.ndarray
    num_new: int
    position_ids: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    past: PastKeyValues | None = None
    source: "SourceInputs | None" = None

    @property
    def plain(self) -> bool:
        """Whether the model reads just the ids, at the default positions."""
        return self.position_ids is None and self.embeddings is None and self.past is None

    @property
    def new_positions(self) -> np.ndarray:
        """int32 [B, T]: the positions of the columns that the model has yet to read."""
        if self.position_ids is not None:
            return self.position_ids
        return counted_positions(self.attention_mask)[:, -self.num_new :]

    def check_plain(self, name: str, why: str, chunk: int | None) -> None:
        """Raises a ValueError unless the prompt is `plain` and prefilled at once.

        Args:
            name: the feature that needs such a prompt, for the message.
            why: the reason, a relative clause of the message.
            chunk: `prefill_chunk_size`.
        """
        given = {
            "cache": self.past,
            "inputs_embeds": self.embeddings,
            "position_ids": self.position_ids,
            "prefill_chunk_size": chunk,
        }
        for other, value in given.items():
            if value is not None:
                raise ValueError(f"`{other}` cannot be combined with {name}, {why}. Leave out one of them.")


def checked_inputs(
    model: Model, inputs: "ArrayLike | None", model_inputs: Mapping[str, Any], config: DecodeConfig
) -> Inputs:
    """The prompt of a call, from all arguments that can hold it.

    Raises:
        ValueError: naming the argument, its value, its range and what to do.
    """
    if inputs is not None and model_inputs.get("input_ids") is not None:
        raise ValueError("`inputs` and `input_ids` were both passed, but are the same argument. Pass one of them.")
    given = model_inputs.get("input_ids") if inputs is None else inputs
    mask, past = mask_array("attention_mask", model_inputs.get("attention_mask")), model_inputs.get("cache")
    if isinstance(past, lazy.torch_class("Cache")):
        past = PastKeyValues.from_transformers(model, past)
    embeddings = checked_embeddings(model_inputs.get("inputs_embeds"), model.hidden_size)
    # With embeddings, ids may be missing or empty: there is no text then, P = 0.
    if embeddings is not None and (given is None or np.shape(given)[1:] == (0,)):
        input_ids = np.zeros((len(embeddings) if given is None else np.shape(given)[0], 0), np.int32)
    else:
        if given is None:
            if config.bos_token_id is None:
                raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
            given = np.full((1 if mask is None else len(mask), 1), config.bos_token_id)
        input_ids = checked_token_ids("input_ids", given, model.vocab_size)
    rows, columns = input_ids.shape
    if embeddings is not None and len(embeddings) != rows:
        raise ValueError(f"`inputs_embeds` has {len(embeddings)} rows, but `input_ids` has {rows}. They must be equal.")
    shape = (rows, columns if embeddings is None else embeddings.shape[1])
    num_cached = 0 if past is None else cached_tokens(past, rows)
    if mask is not None:
        # With a cache the mask has all L columns, and the ids are all L tokens or only the T new ones.
        only_new = mask.shape == (rows, num_cached + columns) and embeddings is None
        shape = (rows, num_cached + columns) if only_new else shape
        mask = checked_mask("attention_mask", mask, shape)
    warn_about_padding(input_ids, mask, config, embeddings is not None)
    if mask is None:
        # If the numbers of columns differ, the mask cannot be inferred from the ids.
        if columns not in (0, shape[1]):
            raise ValueError(
                f"`inputs_embeds` has {shape[1]} columns, but `input_ids` has {columns}. Pass the `attention_mask` of "
                "`inputs_embeds`."
            )
        mask = infer_attention_mask(input_ids, config) if columns else np.ones(shape, bool)
    num_new = mask.shape[1] - num_cached
    if num_new < 1:
        raise ValueError(
            f"`cache` holds {num_cached} tokens, and the prompt has {mask.shape[1]}, so there is no new token to read. "
            f"Pass the whole text, or new `input_ids` with an `attention_mask` that is {num_cached} columns longer, or "
            "remove tokens with `cache.crop`."
        )
    _check_logits_to_keep(model_inputs.get("logits_to_keep"))
    positions = _positions(model_inputs.get("position_ids"), rows, num_new)
    text_mask = np.ones((rows, columns), bool)
    if embeddings is None or columns == mask.shape[1]:  # the ids are the last P of the L tokens
        text_mask = mask[:, -columns:]
    # With a cache, embeddings may be of the whole text or of its new tokens; only the new ones are read.
    embeddings = None if embeddings is None else embeddings[:, -num_new:]
    return Inputs(input_ids, text_mask, mask, num_new, positions, embeddings, past)


def _check_logits_to_keep(given: object) -> None:
    """The value has no effect: `generate` reads the logits of the last token only, as in transformers."""
    if given is not None and (not isinstance(given, (int, np.integer)) or isinstance(given, bool) or given < 0):
        raise ValueError(
            f"`logits_to_keep`={given!r} must be a number of tokens, or 0 for all; `generate` reads the logits of the "
            "last one only. Leave it out."
        )


def _positions(given: "ArrayLike | None", rows: int, num_new: int) -> np.ndarray | None:
    """int32 [B, T]: the positions of the new tokens."""
    if given is None:
        return None
    positions = two_dimensional("position_ids", given)
    if not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"`position_ids` has dtype {positions.dtype}, but must hold integers.")
    # Sums of positions and counts stay below 2**31.
    if (outside := (positions >= 2**30) | (positions < -(2**30))).any():
        raise ValueError(f"`position_ids` holds {positions[outside][0]}, but may hold -2**30 to 2**30 - 1.")
    if positions.shape[0] not in (1, rows) or positions.shape[1] < num_new:
        raise ValueError(
            f"`position_ids` has shape {positions.shape}, but {rows} prompts have {num_new} new tokens. Pass "
            "one position for each."
        )
    return np.broadcast_to(positions[:, -num_new:], (rows, num_new)).astype(np.int32)


def counted_positions(mask: np.ndarray) -> np.ndarray:
    """int32 [B, L]: unmasked positions counted from 0 in each row, and 0 where masked."""
    return np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def warn_about_padding(input_ids: np.ndarray, mask: np.ndarray | None, config: DecodeConfig, embedded: bool) -> None:
    """Warns about padding as transformers 5.24 `_prepare_special_tokens` and `generate` do, for batches only."""
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
    # The last column decides, as in transformers: padding there is on the right.
    if mask is not None and mask.shape == input_ids.shape:
        last = ~mask[:, -1]
    else:
        last = input_ids[:, -1:] == config.fill_token_id
    if last.any() and not embedded:
        logger.warning(
            "A decoder-only architecture is being used, but right-padding was detected! For correct generation "
            "results, please set `padding_side='left'` when initializing the tokenizer."
        )


def infer_attention_mask(input_ids: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """bool [B, P], False on `pad_token_id`; all True if that is not set or is also an `eos_token_id`."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        return np.ones(input_ids.shape, bool)
    return input_ids != config.pad_token_id


def checked_negatives(
    model: Model, inputs: Inputs, given_ids: "ArrayLike | None", given_mask: "ArrayLike | None"
) -> tuple[np.ndarray, np.ndarray]:
    """The negative prompts, int32 [B, P'] and bool [B, P']: by default the last token of each prompt."""
    rows = len(inputs.input_ids)
    ids, mask = inputs.input_ids[:, -1:], np.ones((rows, 1), bool)
    if given_ids is not None:
        ids = checked_token_ids("negative_prompt_ids", given_ids, model.vocab_size)
        if len(ids) != rows:
            raise ValueError(f"`negative_prompt_ids` has {len(ids)} rows, but there are {rows} prompts.")
        mask = np.ones(ids.shape, bool)
    given = mask_array("negative_prompt_attention_mask", given_mask)
    return ids, mask if given is None else checked_mask("negative_prompt_attention_mask", given, ids.shape)


def key_data(key: "ArrayLike | None", config: DecodeConfig, padded_rows: int, rows: int) -> np.ndarray | None:
    """uint32 [2], or [N, 2] for one key per prompt; None for greedy decoding.

    Raises:
        ValueError: if `key` is not a key, or there is not one per prompt.
    """
    if not config.do_sample:
        if key is not None:
            logger.warning("`key` has no effect without `do_sample=True`: nothing is sampled.")
        return None
    if key is None:
        key = secrets.randbits(64)
    refuse_tracer(key)
    advice = "Pass an int, a jax.random key, or one of either per prompt."
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(key))[..., :2]  # keys have two or four words
    else:
        try:
            given = np.asarray(key)
            if given.dtype == bool:
                raise TypeError("True and False are not keys")
            seeds = np.vectorize(operator.index, otypes=[object])(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`key`={key!r} is not a valid PRNG key. {advice}") from error
        if given.dtype == np.uint32 and given.ndim and given.shape[-1] in (2, 4):  # jax.random.PRNGKey
            words = given[..., :2]
        else:
            # High and low word, as `jax.random.PRNGKey` splits a seed of 64 bits.
            words = np.stack([seeds >> 32 & 0xFFFFFFFF, seeds & 0xFFFFFFFF], axis=-1).astype(np.uint32)
    if words.shape not in ((2,), (rows, 2)):
        raise ValueError(f"`key` has shape {words.shape[:-1]}, but there are {rows} prompts. {advice}")
    return words if words.ndim == 1 else np.pad(words, ((0, padded_rows - rows), (0, 0)))

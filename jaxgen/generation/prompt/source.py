"""The input of an encoder, and the decoder's first tokens, from the arguments of `generate`.

Same order as transformers 5.24 `GenerationMixin.generate`: the source, then the decoder's tokens, which begin with a
start token.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgen import lazy
from jaxgen.base import Model, Source
from jaxgen.buckets import bucket
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.config.validators import is_integer
from jaxgen.generation.prompt.checks import (
    checked_embeddings,
    checked_mask,
    checked_token_ids,
    mask_array,
    refuse_tracer,
)
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.prompt.past_key_values import PastKeyValues, cached_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)

_MIN_SOURCE_BUCKET = 16  # one program for all short sources


@dataclass(frozen=True)
class SourceInputs:
    """The checked input of an encoder.

    Attributes:
        inputs: int32 [B, X] tokens, or float [B, X, D]: embeddings, or the encoder's output.
        attention_mask: bool [B, X].
        input_ids: int32 [B, X], for rules that are about the tokens of the source; None if only embeddings are known.
        encoded: whether `inputs` are the encoder's output.
        given: the caller's encoder outputs besides the last hidden state: {"encoder_attentions": one per layer, ...}.
    """

    inputs: np.ndarray
    attention_mask: np.ndarray
    input_ids: np.ndarray | None
    encoded: bool
    given: Mapping[str, tuple[np.ndarray, ...]]

    @property
    def bucket(self) -> int:
        """X of the bucket."""
        return bucket(max(self.attention_mask.shape[1], _MIN_SOURCE_BUCKET))

    def padded(self, rows: int) -> tuple[Source, np.ndarray | None]:
        """The source in its bucket of N rows, and int32 [N, X] ids with -1 on the bucket's padding.

        ```
        x x x x . .      padding is on the right, since some encoders count columns from the left
        x x x x . .
        . . . . . .
        ```
        """
        batch, columns = self.attention_mask.shape
        padding = (0, rows - batch), (0, self.bucket - columns)
        inputs: Any = np.pad(self.inputs, (*padding, *[(0, 0)] * (self.inputs.ndim - 2)))
        ids = None if self.input_ids is None else np.pad(self.input_ids, padding, constant_values=-1)
        source: Any = Source(inputs, np.pad(self.attention_mask, padding), self.encoded)
        return source, ids


def checked_encoder_decoder_inputs(
    model: Model, inputs: "ArrayLike | None", model_inputs: Mapping[str, Any], config: DecodeConfig
) -> Inputs:
    """The source and the decoder's tokens of a call.

    Raises:
        ValueError: naming the argument, its value, the range and a way out.
    """
    past = model_inputs.get("cache")
    if past is not None and not isinstance(past, PastKeyValues):
        raise ValueError(
            f"`cache` is of type {type(past).__name__}, but must be the `cache` of an earlier call of "
            "`jaxgen.generate` with `return_dict_in_generate=True`."
        )
    source = _source(model, inputs, model_inputs, config)
    rows = len(source.attention_mask)
    cached = 0 if past is None else cached_tokens(past, rows)
    ids, mask = _decoder_tokens(model, model_inputs, config, rows, cached)
    # Positions are columns, whatever the mask: explicit ones where counting unmasked columns gives others.
    new = mask.shape[1] - cached
    positions = None
    if not mask.all():
        positions = np.broadcast_to(np.arange(cached, mask.shape[1], dtype=np.int32), (rows, new))
    return Inputs(ids, mask[:, -ids.shape[1] :], mask, new, positions, None, past, source)


def _source(
    model: Model, inputs: "ArrayLike | None", model_inputs: Mapping[str, Any], config: DecodeConfig
) -> SourceInputs:
    given = model_inputs.get("input_ids") if inputs is None else inputs
    embeddings = checked_embeddings(model_inputs.get("inputs_embeds"), model.hidden_size)
    encoded, states = _encoder_outputs(model_inputs.get("encoder_outputs"), model.hidden_size)
    if embeddings is not None and given is not None:
        raise ValueError("You passed `inputs_embeds` and `input_ids` to `.generate()`. Please pick one.")
    if given is None and embeddings is None and encoded is None:
        if config.bos_token_id is None:
            raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
        given = [[config.bos_token_id]]
    ids = None if given is None else checked_token_ids("input_ids", given, model.vocab_size)
    hidden = embeddings if encoded is None else encoded
    array = ids if hidden is None else hidden
    assert array is not None
    if ids is not None and hidden is not None and len(ids) != len(hidden):
        raise ValueError(
            f"`encoder_outputs` has {len(hidden)} rows, but `input_ids` has {len(ids)}. They must be equal."
        )
    mask = mask_array("attention_mask", model_inputs.get("attention_mask"))
    if mask is not None:
        mask = checked_mask("attention_mask", mask, (array.shape[0], array.shape[1]))
    else:
        mask = np.ones(array.shape[:2], bool)
        if len(mask) > 1 and encoded is None and ids is not None and (ids == config.pad_token_id).any():
            logger.warning(
                "`attention_mask` is not set and `input_ids` holds `pad_token_id`=%d. The encoder reads this padding "
                "as text, as in transformers 5. Pass the `attention_mask` of the tokenizer.",
                config.pad_token_id,
            )
    return SourceInputs(array, mask, ids, encoded is not None, states)


def _encoder_outputs(given: object, hidden_size: int) -> tuple[np.ndarray | None, Mapping[str, tuple[np.ndarray, ...]]]:
    """The last hidden state, float [B, X, D], and the other arrays that the object has."""
    if given is None:
        return None, {}
    refuse_tracer(given)
    parts: dict[str, Any] = {"hidden_states": None, "attentions": None}
    if isinstance(given, Mapping):
        last = given.get("last_hidden_state")
        parts |= {name: given.get(name) for name in parts}
    elif isinstance(given, (tuple, list)):
        last, *others = given
        parts |= dict(zip(parts, others, strict=False))
    else:
        last = getattr(given, "last_hidden_state", given)
        parts |= {name: getattr(given, name, None) for name in parts}
    if last is None:
        raise ValueError("`encoder_outputs` has no `last_hidden_state`. Pass the output of `model.encode`.")
    array = lazy.as_numpy(last)
    if array.ndim != 3 or array.shape[2] != hidden_size or 0 in array.shape:
        raise ValueError(
            f"`encoder_outputs` has a last hidden state of shape {array.shape}, but it must be [prompts, columns, "
            f"{hidden_size}]. Take it from `model.encode(input_ids, attention_mask)`."
        )
    states = {
        f"encoder_{name}": tuple(lazy.as_numpy(layer) for layer in layers)
        for name, layers in parts.items()
        if layers is not None
    }
    return array, states


def _decoder_tokens(
    model: Model, model_inputs: Mapping[str, Any], config: DecodeConfig, rows: int, cached: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, P] and bool [B, L]: the decoder's first tokens, and the mask of these and the cached ones."""
    start = _start_tokens(model, config, rows)
    given = model_inputs.get("decoder_input_ids")
    mask = mask_array("decoder_attention_mask", model_inputs.get("decoder_attention_mask"))
    if given is None:
        if cached:
            raise ValueError(
                f"`cache` holds {cached} tokens, but there are no `decoder_input_ids`. Pass the whole text, as in the "
                "`sequences` of the call that the cache is from."
            )
        ids = start
    else:
        ids = checked_token_ids("decoder_input_ids", given, model.vocab_size)
        if len(ids) != rows:
            raise ValueError(
                f"`decoder_input_ids` has {len(ids)} rows, but there are {rows} prompts. They must be equal."
            )
        # As in transformers, only if no row begins with it. Tokens after cached ones begin with no start token.
        if (not cached or ids.shape[1] > cached) and (ids[:, 0] != start[:, 0]).all():
            ids = np.concatenate([start, ids], axis=1)
            if mask is not None:
                mask = np.concatenate([np.ones_like(mask[:, :1]), mask], axis=1)
    width = ids.shape[1] if ids.shape[1] > cached else cached + ids.shape[1]
    if mask is None:
        return ids, np.ones((rows, width), bool)
    if mask.shape == (rows, cached + ids.shape[1]):
        width = mask.shape[1]
    return ids, checked_mask("decoder_attention_mask", mask, (rows, width))


def _start_tokens(model: Model, config: DecodeConfig, rows: int) -> np.ndarray:
    """int32 [B, 1]: `decoder_start_token_id`, or `bos_token_id`."""
    start = config.merged.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError("`decoder_start_token_id` or `bos_token_id` has to be defined for encoder-decoder generation.")
    tokens = np.asarray(start)
    if tokens.ndim == 1 and len(tokens) != rows:
        raise ValueError(f"`decoder_start_token_id` expected to have length {rows} but got {len(tokens)}")
    for token in tokens.reshape(-1).tolist():
        if not is_integer(token) or not 0 <= token < model.vocab_size:
            raise ValueError(
                f"`decoder_start_token_id`={start!r} must hold ids of this model, 0 to {model.vocab_size - 1}."
            )
    return np.broadcast_to(tokens.reshape(-1, 1), (rows, 1)).astype(np.int32)

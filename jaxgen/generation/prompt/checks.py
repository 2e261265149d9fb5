"""Checks of single arrays of a call on the host, each with the name of its argument."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgen import lazy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)


def checked_token_ids(name: str, given: "ArrayLike", vocab_size: int) -> np.ndarray:
    """Token ids as int32 [B, P]; raises a ValueError unless all of them are in the vocabulary."""
    ids = two_dimensional(name, given)
    if ids.size == 0:
        raise ValueError(f"`{name}` has shape {ids.shape}, but every prompt needs at least one token.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{name}` has dtype {ids.dtype}, but token ids are integers. Tokenise the text first.")
    # JAX would clamp an id outside of the vocabulary, where torch raises.
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`{name}` holds {low if low < 0 else high}, but ids of this model are 0 to {vocab_size - 1}. "
            "Check that tokenizer and model belong together."
        )
    return ids.astype(np.int32)


def checked_embeddings(given: "ArrayLike | None", hidden_size: int) -> np.ndarray | None:
    """The embeddings as float [B, T, D], checked; None if there are none."""
    if given is None:
        return None
    refuse_tracer(given)
    try:
        embeddings = lazy.as_numpy(given)
    except ValueError as error:
        raise ValueError(f"`inputs_embeds` is not a rectangular array ({error}).") from error
    if embeddings.ndim != 3 or embeddings.shape[2] != hidden_size or 0 in embeddings.shape:
        raise ValueError(
            f"`inputs_embeds` has shape {embeddings.shape}, but must be [prompts, columns, {hidden_size}] and "
            "not empty. Take it from `model.embed_tokens(input_ids)`."
        )
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(
            f"`inputs_embeds` has dtype {embeddings.dtype}, but must be floating. Pass ids as `input_ids`."
        )
    return embeddings


def mask_array(name: str, given: "ArrayLike | None") -> np.ndarray | None:
    """The mask as an array with two dimensions; its shape and values are not checked yet."""
    if given is None:
        return None
    array = _rectangular(name, given)
    if array.ndim > 2:  # the message of transformers
        raise ValueError(f"`{name}` passed to `generate` must be 2D, but has {array.ndim} dimensions.")
    return two_dimensional(name, array)


def checked_mask(name: str, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The mask as bool; raises a ValueError unless it has this shape. For a row that is all masked it only warns."""
    if mask.shape != shape:
        raise ValueError(f"`{name}` has shape {mask.shape}, but its ids have {shape}. They must be equal.")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"`{name}` holds {mask[~np.isin(mask, (0, 1))][0]}, but must hold 0 and 1 only.")
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        logger.warning("`%s` masks all of row %d: its continuation will not be meaningful.", name, row)
    return mask.astype(bool)


def two_dimensional(name: str, given: "ArrayLike") -> np.ndarray:
    array = _rectangular(name, given)
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` has shape {array.shape}, but must be [prompts, tokens]. Wrap a single prompt in a list."
        )
    return array


def _rectangular(name: str, given: "ArrayLike") -> np.ndarray:
    refuse_tracer(given)
    _refuse_text(name, given)
    if isinstance(given, Mapping):
        raise ValueError(f"`{name}` is a mapping of {list(given)}. Pass its parts: generate(model, **inputs).")
    try:
        return np.asarray(given)
    except ValueError as error:
        raise ValueError(f"`{name}` is not a rectangular array ({error}). Pad the rows to one length.") from error


def _refuse_text(name: str, given: object) -> None:
    # The first element, at any depth: a list of texts is the same mistake as a text.
    first = given
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, np.ndarray) and first.dtype.kind in "USO":
        first = first.flat[0] if first.size else first
    if isinstance(first, (str, bytes)):
        raise ValueError(
            f"`{name}` is text ({first[:40]!r}), but `generate` takes token ids. Tokenise it: `generate(model, "
            '**tokenizer(texts, padding=True, return_tensors="np"))`, with `texts` a list of strings and the '
            "`tokenizer` of the model."
        )


def refuse_tracer(value: object) -> None:
    """Raises ValueError if the value is a tracer."""
    if isinstance(value, Tracer):
        raise ValueError(
            "`generate`, `stream` and `prepare` run on the host, not inside jit, vmap or grad. Use `jaxgen.decode` "
            "there, with a call that `prepare` returned outside of it."
        )

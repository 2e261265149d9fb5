"""Token healing: the last token of each prompt is chosen anew among those that extend its text.

A prompt that ends within a word, as "The link is http:" does, was cut by the tokenizer where no text would have been.
Same as transformers 5.24 `GenerationMixin.heal_tokens`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen import lazy

_BIAS = 10.0  # makes every extension likelier than any other token
_OWN_BIAS = 1.0  # for the token that is there, so that "http" does not become "https" without a reason


def heal(input_ids: np.ndarray, tokenizer: Any, one_token: Callable[[np.ndarray, Any, int], Any]) -> np.ndarray:
    """The healed prompts, int32 [B, P'] of int32 [B, P]; P' differs where the tokenizer cuts the text in other places.

    Args:
        input_ids: the prompts.
        tokenizer: the model's.
        one_token: continues int32 [1, P] by a token under a GenerationConfig, for a row of the prompts.
    """
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    # White space around a prompt means nothing, and would keep its last word from being extended.
    texts = [text.strip() for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
    input_ids = tokenizer(texts, return_tensors="np", padding=True)["input_ids"].astype(np.int32)
    if bos is not None and pad is not None:
        input_ids = np.where(input_ids == bos, pad, input_ids)
    vocabulary = tokenizer.get_vocab()
    config = lazy.transformers().GenerationConfig(max_new_tokens=1, pad_token_id=pad)
    for row, ids in enumerate(input_ids):
        tail = ids[-1:].tolist()
        if not tail or (ids == pad).all():
            continue
        prefix = _as_token(tokenizer.decode(tail), tokenizer)
        bias = {(token,): _BIAS for text, token in vocabulary.items() if text.startswith(prefix)}
        if (tail[0],) not in bias or len(bias) == 1 or len(ids) == 1:
            continue
        bias[(tail[0],)] += _OWN_BIAS
        config.update(sequence_bias=bias)
        trimmed = ids[:-1].copy()
        if (ids != pad).sum() == 1:
            trimmed[-1] = bos
        input_ids[row] = one_token(trimmed[None], config, row)[0]
    return input_ids


def _as_token(text: str, tokenizer: Any) -> str:
    """The text as tokens spell it, where a space may be another character."""
    space = tokenizer.convert_tokens_to_ids(" ")
    return text if space is None else text.replace(" ", tokenizer.convert_ids_to_tokens(space)[0])

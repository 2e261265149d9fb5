"""Token healing: the last token of each prompt is chosen again among those that extend its text.

The tokenizer may split the end of a prompt differently than the whole text: "http:" ends within the token "://". Same
as transformers 5.24 `GenerationMixin.heal_tokens`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from jaxgen import lazy
from jaxgen.base import Model
from jaxgen.generation.config.resolve import resolve
from jaxgen.generation.prompt.inputs import Inputs, key_data
from jaxgen.generation.request import Request

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig, PreTrainedTokenizerBase

_BIAS = 10.0  # makes every extension more likely than any other token
_OWN_BIAS = 1.0  # for the current token, so that "http" does not become "https" without a reason


OneToken = Callable[[np.ndarray, "GenerationConfig", np.ndarray | None], np.ndarray]


def healed_inputs(model: Model, inputs: Inputs, request: Request, one_token: OneToken) -> Inputs:
    """The checked prompt of a request with its last tokens chosen again.

    Args:
        model: the call's model.
        inputs: the prompt before healing.
        request: the call's arguments, with its tokenizer and key.
        one_token: continues int32 [1, P] by one token, with a GenerationConfig and a key.

    Raises:
        ValueError: without a tokenizer, or with a cache, embeddings or positions.
    """
    tokenizer = request.tokenizer
    if tokenizer is None:
        raise ValueError(
            " When generating with token healing, you must pass the model's tokenizer to the `tokenizer` argument of "
            "`generate`."
        )
    if not callable(tokenizer):
        raise ValueError(
            f"`tokenizer` must be a transformers tokenizer, but is {tokenizer!r}. Pass the model's tokenizer."
        )
    if not inputs.plain:
        raise ValueError(
            "`token_healing` changes the prompt, so it cannot be combined with `cache`, `inputs_embeds` or "
            "`position_ids`. Leave out one of them."
        )

    # Samples only if the checkpoint's config has `do_sample`, as in transformers.
    keys, rows = None, len(inputs.input_ids)
    if request.key is not None and model.generation_config.do_sample:
        keys = key_data(request.key, resolve(model.generation_config, None, {})[0], rows, rows)

    def with_key(prompt: np.ndarray, config: "GenerationConfig", row: int) -> np.ndarray:
        return one_token(prompt, config, keys if keys is None or keys.ndim == 1 else keys[row])

    input_ids = heal(inputs.input_ids, tokenizer, with_key)
    if input_ids.shape == inputs.input_ids.shape:
        return replace(inputs, input_ids=input_ids)
    if not inputs.attention_mask.all():
        raise ValueError(
            f"`token_healing` made prompts of {input_ids.shape[1]} tokens, but the `attention_mask` has "
            f"{inputs.attention_mask.shape[1]} columns. Heal one prompt at a time."
        )
    mask = np.ones(input_ids.shape, bool)
    return replace(inputs, input_ids=input_ids, text_mask=mask, attention_mask=mask, num_new=input_ids.shape[1])


def heal(
    input_ids: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    one_token: Callable[[np.ndarray, "GenerationConfig", int], np.ndarray],
) -> np.ndarray:
    """The healed prompts, int32 [B, P']. P' differs from P if the tokenizer splits the text in other places.

    Args:
        input_ids: int32 [B, P].
        tokenizer: the model's.
        one_token: continues int32 [1, P] by one token, with a GenerationConfig, for a row of the prompts.
    """
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    # White space at the end would prevent an extension of the last word.
    texts = [text.strip() for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
    input_ids = np.asarray(tokenizer(texts, return_tensors="np", padding=True)["input_ids"], np.int32)
    # As in transformers, so that the bos that the tokenizer adds is not part of the text.
    if bos is not None and pad is not None:
        input_ids = np.where(input_ids == bos, pad, input_ids)
    vocabulary = tokenizer.get_vocab()
    config = lazy.transformers().GenerationConfig(max_new_tokens=1, pad_token_id=pad)
    for row, ids in enumerate(input_ids):
        tail = ids[-1:].tolist()
        if not tail or (ids == pad).all():  # nothing to heal in a prompt without tokens
            continue
        prefix = _as_token(tokenizer.batch_decode([tail])[0], tokenizer)
        bias = {(token,): _BIAS for text, token in vocabulary.items() if text.startswith(prefix)}
        if (tail[0],) not in bias or len(bias) == 1 or len(ids) == 1:
            continue
        # The prompt without its last token is continued by one token, with the bias towards extensions of that token.
        bias[(tail[0],)] += _OWN_BIAS
        config.update(sequence_bias=bias)
        trimmed = ids[:-1].copy()
        # A prompt of one token continues from bos.
        if (ids != pad).sum() == 1:
            trimmed[-1] = bos
        input_ids[row] = one_token(trimmed[None], config, row)[0]
    return input_ids


def _as_token(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text as it is written in the vocabulary, for example with "Ġ" for each space."""
    space = tokenizer.convert_tokens_to_ids(" ")
    return text if space is None else text.replace(" ", tokenizer.convert_ids_to_tokens(space)[0])

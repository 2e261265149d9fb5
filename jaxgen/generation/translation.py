"""Translates tokens from one tokenizer to another, for an assistant that has its own vocabulary.

Drafts need not be exact, so a table of single tokens is enough: each token is translated by its own text, regardless of
its neighbours. Only prompts are encoded as whole texts.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgen.base import Prompt
from jaxgen.buckets import bucket
from jaxgen.decoding.assistant import MOST_PIECES, Translation
from jaxgen.generation.prompt.inputs import Inputs

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase

_MIN_PROMPT = 16  # columns, so that short prompts share a program


def translation(
    tokenizer: "PreTrainedTokenizerBase",
    assistant_tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    assistant_vocab_size: int,
    inputs: Inputs,
    rows: int,
) -> Translation:
    """The tables of two tokenizers, and the prompts of a call in the assistant's tokens.

    Args:
        tokenizer: the model's.
        assistant_tokenizer: the assistant's.
        vocab_size: V, the model's.
        assistant_vocab_size: the assistant's.
        inputs: the prompts.
        rows: N, the rows of the compiled program.
    """
    same, pieces, counts = _tables(tokenizer, assistant_tokenizer, vocab_size, assistant_vocab_size)
    return Translation(same, pieces, counts, _prompt(tokenizer, assistant_tokenizer, inputs, rows))


def _prompt(tokenizer: Any, assistant_tokenizer: Any, inputs: Inputs, rows: int) -> Prompt:
    """The prompts in the assistant's tokens, padded on the left to a bucket."""
    texts = [
        tokenizer.decode(ids[mask.astype(bool)], skip_special_tokens=True)
        for ids, mask in zip(inputs.input_ids, inputs.text_mask, strict=True)
    ]
    encoded = [list(assistant_tokenizer(text)["input_ids"]) or [_any_id(assistant_tokenizer)] for text in texts]
    length = max(map(len, encoded))
    columns = bucket(max(length, _MIN_PROMPT))
    ids, mask = np.zeros((rows, columns), np.int32), np.zeros((rows, columns), bool)
    for row, tokens in enumerate(encoded):
        ids[row, columns - len(tokens) :] = tokens
        mask[row, columns - len(tokens) :] = True
    return Prompt(ids, mask, length, len(encoded))


@functools.lru_cache(maxsize=4)
def _tables(
    tokenizer: Any, assistant_tokenizer: Any, vocab_size: int, assistant_vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`same`, `pieces` and `counts` of `Translation`."""
    own = _normalised(assistant_tokenizer)
    ids = {text: token for token, text in own.items() if token < assistant_vocab_size}
    if None not in (tokenizer.eos_token_id, assistant_tokenizer.eos_token_id):
        ids[_normalised(tokenizer)[tokenizer.eos_token_id]] = assistant_tokenizer.eos_token_id
    texts = {token: text for token, text in _normalised(tokenizer).items() if token < vocab_size}
    same = np.full(vocab_size, -1, np.int32)
    pieces, counts = (
        np.full((vocab_size, MOST_PIECES), _any_id(assistant_tokenizer), np.int32),
        np.ones(vocab_size, np.int32),
    )
    missing = []
    for token, text in texts.items():
        if (found := ids.get(text, -1)) >= 0:
            same[token] = pieces[token, 0] = found
        else:
            missing.append(token)
    spelled = [_text(tokenizer, token, texts[token]) for token in missing]
    encoded = assistant_tokenizer(spelled, add_special_tokens=False)["input_ids"] if spelled else []
    for token, tokens in zip(missing, encoded, strict=True):
        if kept := [each for each in tokens if each < assistant_vocab_size][:MOST_PIECES]:
            pieces[token, : len(kept)] = kept
            counts[token] = len(kept)
    return same, pieces, counts


def _normalised(tokenizer: Any) -> dict[int, str]:
    """The text of each token by id, with a space in place of the character that marks one."""
    sign = "".join(tokenizer.tokenize(" a"))[:1]  # "Ġ" in byte-level vocabularies, "▁" in those of sentencepiece
    sign = "" if sign in " a" else sign
    return {token: text.replace(sign, " ") if sign else text for text, token in tokenizer.get_vocab().items()}


def _text(tokenizer: Any, token: int, normalised: str) -> str:
    """The text of a token in the middle of a text: `decode` alone may drop its leading space."""
    text = tokenizer.decode([token])
    return f" {text}" if normalised.startswith(" ") and not text.startswith(" ") else text


def _any_id(tokenizer: Any) -> int:
    """A token id that stands for texts without tokens."""
    given = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((each for each in given if each is not None), 0)

"""The text of a decode as it comes, right for every tokenizer.

The text of some ids is not the texts of their parts side by side: a word of sentencepiece begins with a space that is
dropped at the start of a text, and a character may be several ids long. So all ids so far are decoded each time, and of
their text a piece is held back as long as later ids may change it.
"""

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from jaxgen.base import Model
from jaxgen.generation.api import follow, prepare_stream
from jaxgen.generation.request import Request

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextPieces:
    """The text of ids that come bit by bit. All pieces together are `decode(ids, skip_special_tokens=True)`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._ids, self._text = tokenizer, list[int](), ""

    def add(self, ids: Iterable[int]) -> str:
        """What can be shown after these ids, besides what was shown before; often nothing."""
        self._ids += map(int, ids)
        settled = len(self._ids)
        while settled and self._is_open(self._ids[settled - 1]):
            settled -= 1
        text = self._decode(self._ids[:settled])
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # which is what a part of a character looks like
        last_word = text.rpartition(" ")[2]
        if self._tokenizer.clean_up_tokenization_spaces:
            if text.endswith("'"):  # "do n '" and "t" will be "don't": two words may still change
                text = text.rpartition(" ")[0].rpartition(" ")[0]
            elif len(last_word) < 3:  # " ." will be ".", " n't" will be "n't"
                text = text.rpartition(" ")[0]
        return self._piece(text)

    def end(self) -> str:
        """The rest, which was held back."""
        return self._piece(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _is_open(self, token_id: int) -> bool:
        """Whether what follows may change the text of this id.

        Bytes that stand side by side are decoded together: the next one may complete them or spoil them all. An id
        without a text of its own may stand between them.
        """
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return bool(_BYTE.fullmatch(token or "")) or not self._decode([token_id])

    def _piece(self, text: str) -> str:
        if not text.startswith(self._text):
            return ""
        piece, self._text = text[len(self._text) :], text
        return piece


def stream_text(
    model: Model, tokenizer: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any
) -> Iterator[str]:
    """The new text of one prompt as it comes: `for piece in stream_text(model, tokenizer, "Once upon a time")`.

    Args:
        model: as in `generate`.
        tokenizer: the model's. Stop strings use it, too.
        inputs: the prompt as text, or as in `generate` with one row.
        generation_config: as in `generate`.
        **kwargs: as in `stream`.

    Yields:
        Pieces that together are `tokenizer.decode(new_ids, skip_special_tokens=True)`. A character or a word comes when
        no later token can change it.

    Raises:
        ValueError: as `stream`, and for more than one row; at the call and not at the first piece.
    """
    if isinstance(inputs, str):
        encoded = tokenizer(inputs, return_tensors="np")
        inputs, kwargs = encoded["input_ids"], {"attention_mask": np.ones(encoded["input_ids"].shape, int), **kwargs}
    prepared = prepare_stream(model, Request.of(inputs, generation_config, {"tokenizer": tokenizer, **kwargs}))
    if (rows := prepared.rows * prepared.mode.sequences_per_prompt) > 1:
        raise ValueError(
            f"`stream_text` follows one text, but the call makes {rows}. Pass one prompt and `num_return_sequences=1`, "
            "or use `stream`, which yields the tokens of all rows."
        )
    return _pieces(TextPieces(tokenizer), follow(model, prepared))


def _pieces(text: TextPieces, chunks: Generator[np.ndarray, None, None]) -> Iterator[str]:
    with contextlib.closing(chunks):
        for chunk in chunks:
            if piece := text.add(chunk[0]):
                yield piece
    if piece := text.end():
        yield piece

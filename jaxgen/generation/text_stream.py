"""Streaming of text, exact for every tokenizer.

The text of some token ids is not the concatenation of the texts of its parts: a word of sentencepiece begins with a
space that is dropped at the start of a text, and a character can take several ids. So each time, all ids so far are
decoded, and the end of the text is held back while later ids may change it.
"""

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.base import Model
from jaxgen.generation.api import follow, prepare_stream
from jaxgen.generation.request import Request

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from jaxgen.lazy import GenerationConfig, PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextPieces:
    """Text of token ids that arrive in parts. All pieces together are `decode(ids, skip_special_tokens=True)`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._ids, self._text = tokenizer, list[int](), ""

    def add(self, ids: Iterable[int]) -> str:
        """The text that these ids make final, without earlier pieces; often empty."""
        self._ids += map(int, ids)
        settled = len(self._ids)
        while settled and self._is_open(self._ids[settled - 1]):
            settled -= 1
        text = self._decode(self._ids[:settled])
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # stands for an incomplete character
        last_word = text.rpartition(" ")[2]
        if self._tokenizer.clean_up_tokenization_spaces:
            if text.endswith("'"):  # "do n '" and "t" become "don't": two words can still change
                text = text.rpartition(" ")[0].rpartition(" ")[0]
            elif len(last_word) < 3:  # " ." becomes ".", " n't" becomes "n't"
                text = text.rpartition(" ")[0]
        return self._piece(text)

    def end(self) -> str:
        """The rest of the text, which was held back."""
        return self._piece(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str), "one sequence of ids has one text"
        return text

    def _is_open(self, token_id: int) -> bool:
        """Whether later ids may change the text of this one.

        Neighbouring bytes are decoded together: the next one can complete them or make them all invalid. An id without
        text can be between them.
        """
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return bool(isinstance(token, str) and _BYTE.fullmatch(token)) or not self._decode([token_id])

    def _piece(self, text: str) -> str:
        # Held back as long as the text does not continue the earlier pieces.
        if not text.startswith(self._text):
            return ""
        piece, self._text = text[len(self._text) :], text
        return piece


def stream_text(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "str | ArrayLike | None" = None,
    generation_config: "GenerationConfig | None" = None,
    **kwargs: object,
) -> Iterator[str]:
    """The new text of one prompt as it comes: `for piece in stream_text(model, tokenizer, "Once upon a time")`.

    Args:
        model: as in `generate`.
        tokenizer: the model's; stop strings use it too.
        inputs: the prompt as text, or as in `generate` with one row.
        generation_config: as in `generate`.
        **kwargs: as in `stream`.

    Yields:
        Pieces that together are `tokenizer.decode(new_ids, skip_special_tokens=True)`. A character or word is yielded
        once no later token can change it.

    Raises:
        ValueError: as `stream`, and for more than one row, when `stream_text` is called and not at the first piece.
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
    return _pieces(TextPieces(tokenizer), follow(prepared))


def _pieces(text: TextPieces, chunks: Generator[np.ndarray, None, None]) -> Iterator[str]:
    with contextlib.closing(chunks):
        for chunk in chunks:
            if piece := text.add(chunk[0]):
                yield piece
    if piece := text.end():
        yield piece

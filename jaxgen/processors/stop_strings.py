"""Stop strings, matched on token ids with lookup tables.

Same as transformers 5.24 `StopStringCriteria`, which matches backwards. The newest token must begin with the end of the
string. From there backwards, each token must continue the match, until the beginning of the string is reached or
passed. Positions are counted in characters from the end of the string. Tables with a row for each token of the
vocabulary hold what a token can match. A string may begin in the prompt, but must end in the newest token.

```
text           ... "so"   "me st"   "op!!"      stop string "stop", of 4 characters
overlap                             2           "op!!" may begin with the last 2 characters of the string
reached            9      7         2           2, then 2 + 5, then 7 + 2 characters from its end
fits                      yes                   "me st" may end where 2 characters of the string follow
                          7 >= 4                the beginning is passed: the row is finished
```
"""

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.buckets import bucket
from jaxgen.pytree import Int32, pytree

_PADDING = -1  # pads the tables: never equal to a sum of lengths, and not a valid overlap
_MIN_STRINGS, _MIN_NUMBERS, _MIN_WINDOW = 2, 6, 16  # sizes of the tables, so that usual stop strings share a program


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that this module calls."""

    def __len__(self) -> int: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def convert_tokens_to_string(self, tokens: list[str]) -> str: ...


@pytree
@dataclass(frozen=True)
class StopStrings:
    """Finishes a row on the token that completes one of the strings.

    Lengths are in characters, or in bytes for tokenizers that work on bytes. Row V of the tables is for columns before
    the text. Tables are padded with -1.

    Attributes:
        overlaps: int16 [V + 1, strings, numbers]. How many last characters of a string a token may begin with.
        places: int16 [V + 1, strings, numbers]. How many characters of a string may follow a token inside it.
        lengths: int32 [V + 1]. Length of each token.
        targets: int32 [strings]. Length of each string; 2**30 in unused places.
        window: static: the maximum number of tokens in a string.
    """

    overlaps: jax.Array
    places: jax.Array
    lengths: Int32
    targets: Int32
    window: int = field(metadata={"static": True})

    @classmethod
    def build(cls, strings: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> "StopStrings":
        """Builds the tables from the strings and the tokens. Table sizes are rounded up.

        The last 8 results are cached for each tokenizer, since scanning a large vocabulary takes a second.

        Raises:
            ValueError: if no token overlaps the end of any string.
        """
        cache = _vocabulary(tokenizer).cache
        key = tuple(strings), vocab_size
        if key not in cache:
            cache[key] = cls._build(strings, tokenizer, vocab_size)
            if len(cache) > 8:
                del cache[next(iter(cache))]  # the oldest
        return cache[key]

    @classmethod
    def _build(cls, strings: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> "StopStrings":
        vocabulary = _vocabulary(tokenizer)
        decoded = vocabulary.decoded
        # Texts and strings are compared character by character, or byte by byte.
        wanted = [_as_characters(string.encode()) if vocabulary.in_bytes else string for string in strings]
        rows = max(vocab_size, max(decoded, default=0) + 1)
        lengths = np.full(rows + 1, _PADDING, np.int32)
        for token, text in decoded.items():
            lengths[token] = len(text)
        overlaps, places = zip(*(_matches(decoded, string) for string in wanted), strict=True)
        if not any(overlaps):
            raise ValueError(
                "Stop string preprocessing was unable to identify tokens matching one or more of the supplied stop "
                f"string(s), {[*strings]}: no token of this tokenizer ends them. This is most often caused by the stop "
                "strings containing unusual characters that are not in the tokenizer vocabulary."
            )
        size = bucket(max(len(wanted), _MIN_STRINGS))
        return cls(
            overlaps=_table(overlaps, rows),
            places=_table(places, rows),
            lengths=lengths,
            targets=[*map(len, wanted), *[2**30] * (size - len(wanted))],
            window=bucket(max(_MIN_WINDOW, *map(len, wanted))),
        )

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool [N]; see `base.StoppingCriterion`."""
        columns = cur_len - 1 - jnp.arange(min(self.window, input_ids.shape[1]))  # the newest token first
        no_token = len(self.lengths) - 1
        tokens = jnp.where(columns[None] >= 0, jnp.take(input_ids, columns, axis=1, mode="clip"), no_token)
        ends = self.overlaps[tokens[:, 0]].astype(jnp.int32)  # [N, strings, overlaps]
        earlier = jnp.cumsum(self.lengths[tokens[:, 1:]], axis=1)
        # [N, window, strings, overlaps]: the characters from the beginning of each token to the end of the string.
        reached = jnp.concatenate([ends[:, None], ends[:, None] + earlier[:, :, None, None]], axis=1)
        # A token fits if the token after it begins at one of its places. The newest token fits if it overlaps at all.
        fits = (reached[:, :-1, :, None] == self.places[tokens[:, 1:]][..., None].astype(jnp.int32)).any(axis=3)
        fits = jnp.concatenate([ends[:, None] > 0, fits], axis=1)
        so_far = jnp.cumprod(fits, axis=1).astype(bool)  # whether a token and all after it fit
        return ((reached >= self.targets[None, None, :, None]) & so_far).any(axis=(1, 2, 3))


Numbers = dict[int, list[int]]  # by token id


def _table(strings: Sequence[Numbers], rows: int) -> jax.Array:
    """int16 [V + 1, strings, numbers] of the numbers of each token, for each string."""
    most = max((len(numbers) for string in strings for numbers in string.values()), default=1)
    shape = rows + 1, bucket(max(len(strings), _MIN_STRINGS)), bucket(max(most, _MIN_NUMBERS))
    table = np.full(shape, _PADDING, np.int16)
    for index, string in enumerate(strings):
        for token, numbers in string.items():
            table[token, index, : len(numbers)] = numbers
    with jax.ensure_compile_time_eval():  # an array and not a tracer, since it is cached for other calls
        return jnp.asarray(table)


def _matches(decoded: Mapping[int, str], string: str) -> tuple[Numbers, Numbers]:
    """Overlaps and places of the tokens that can be part of a string; see `StopStrings`.

    For "stop", "op!" has the overlap 2, and "st" has the place 2: the 2 characters of "op" follow it.
    """
    overlaps: Numbers = {}
    places: Numbers = {}
    # Most tokens of a large vocabulary share no end with the string. Their ends are enough to rule them out.
    characters, size = set(string), len(string)
    for token, text in decoded.items():
        if not text or not (text[0] in characters or text[-1] in characters or string in text):
            continue
        # The first k characters of the token end with the string, or are the end of the string.
        ends = (min(k, size) for k in range(1, len(text) + 1) if text[:k].endswith(string[-min(k, size) :]))
        # The string without its last i characters ends with the token, or the token ends with it.
        within = (i for i in range(1, size) if text.endswith(string[max(0, size - i - len(text)) : size - i]))
        for table, numbers in ((overlaps, ends), (places, within)):
            if numbers := list(dict.fromkeys(numbers)):
                table[token] = numbers
    return overlaps, places


@dataclass(frozen=True)
class _Vocabulary:
    """The text of every token of a tokenizer, and a cache of the stop strings built from it.

    Attributes:
        size: the tokenizer's size when it was read: it may grow by `add_tokens`.
        decoded: the text of each token id. If `in_bytes`, one character for each byte, see `_as_characters`.
        in_bytes: whether the tokenizer works on bytes.
        cache: the stop strings by their strings and the vocabulary size.
    """

    size: int
    decoded: dict[int, str]
    in_bytes: bool
    cache: dict[tuple[tuple[str, ...], int], StopStrings]


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()


def _as_characters(text: bytes) -> str:
    """One character per byte, so that all texts are strings although tokens may split UTF-8 characters."""
    return text.decode("latin-1")


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    if not all(callable(getattr(tokenizer, name, None)) for name in ("get_vocab", "convert_tokens_to_string")):
        raise ValueError(
            f"`tokenizer`={tokenizer!r} must be the model's tokenizer, from AutoTokenizer.from_pretrained."
        )
    known = _vocabularies.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        form = _byte_form(tokenizer)
        known = _Vocabulary(len(tokenizer), _decoded(tokenizer, form), form is not None, {})
        _vocabularies[tokenizer] = known
    return known


def _byte_form(tokenizer: Tokenizer) -> str | None:
    """How tokens represent bytes: "ByteFallback" (<0x0A>), "ByteLevel" (one character per byte), or None."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    settings = decoder.__getstate__()
    settings = settings.decode() if isinstance(settings, bytes) else str(settings)
    return next(
        (form for form in ("ByteFallback", "ByteLevel") if f'"type":"{form}"' in settings.replace(" ", "")), None
    )


def _decoded(tokenizer: Tokenizer, form: str | None) -> dict[int, str]:
    """The text of each token id; see `_Vocabulary`."""
    # Decoded alone, a token may lose its leading space. So it is decoded after other tokens, whose text is removed.
    before = "abcdef"
    base = tokenizer.convert_ids_to_tokens(tokenizer(before, add_special_tokens=False)["input_ids"])
    characters = lazy.byte_characters() if form == "ByteLevel" else {}
    decoded: dict[int, str] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if form == "ByteLevel" and all(character in characters for character in token):
            decoded[token_id] = _as_characters(bytes(characters[character] for character in token))
        elif form == "ByteFallback" and re.fullmatch("<0x[0-9a-fA-F]{2}>", token):
            decoded[token_id] = _as_characters(bytes([int(token[3:5], 16)]))
        else:
            text = tokenizer.convert_tokens_to_string([*base, token])
            if before not in text:
                raise ValueError(
                    f"`stop_strings` need the text of each token, but this `tokenizer` decodes {[*base, token]} as "
                    f"{text!r}: it cannot spell {before!r}. Pass a criterion of your own as `stopping_criteria`."
                )
            text = text[text.index(before) + len(before) :]
            decoded[token_id] = text if form is None else _as_characters(text.encode())
    return decoded

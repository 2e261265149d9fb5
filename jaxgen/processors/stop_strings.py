"""Stop strings as array maths over tokens: which tokens may end a string, and which may come before them.

Same as transformers 5.24 `StopStringCriteria`, whose idea is to match backwards. The last token has to overlap the end
of the string, by some characters. Each token before it has to fit at the place that the tokens after it have reached,
counted from the end of the string, until its beginning is reached or passed. All that depends on a token alone is
looked up in a table [V]. A string may begin in the prompt, but its end has to be in the newest token.
"""

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.buckets import bucket
from jaxgen.pytree import Int32, pytree

_NO_PLACE = -1  # fills the tables: no sum of lengths equals it, and no overlap is negative
_MIN_STRINGS, _MIN_NUMBERS, _MIN_WINDOW = 2, 6, 16  # usual stop strings share a program


@pytree
@dataclass(frozen=True)
class StopStrings:
    """Finishes a row on the token that completes one of M strings.

    Characters are those of the strings, or bytes with tokenizers that work on bytes.

    Attributes:
        overlaps: int16 [V + 1, M, E]. With how many of the last characters of a string a token may begin.
        places: int16 [V + 1, M, T]. How many characters of a string may come after a token within it.
        lengths: int32 [V + 1]. Characters of a token.
        targets: int32 [M]. Characters of a string.
        window: static: the tokens that a string can take at the most.
    """

    overlaps: jax.Array
    places: jax.Array
    lengths: Int32
    targets: Int32
    window: int = field(metadata={"static": True})

    @classmethod
    def build(cls, strings: Sequence[str], tokenizer: Any, vocab_size: int) -> "StopStrings":
        """From the strings and the tokens. The sizes of the tables are rounded up.

        The last ones of each tokenizer are kept: a large vocabulary takes a second to go through.

        Raises:
            ValueError: if no token overlaps the end of any string.
        """
        kept = _vocabulary(tokenizer).kept
        key = tuple(strings), vocab_size
        if key not in kept:
            kept[key] = cls._build(strings, tokenizer, vocab_size)
            if len(kept) > 8:
                del kept[next(iter(kept))]
        return kept[key]

    @classmethod
    def _build(cls, strings: Sequence[str], tokenizer: Any, vocab_size: int) -> "StopStrings":
        vocabulary = _vocabulary(tokenizer)
        decoded = vocabulary.decoded
        wanted = [string.encode() if vocabulary.in_bytes else string for string in strings]
        rows = max(vocab_size, max(decoded, default=0) + 1)
        lengths = np.full(rows + 1, _NO_PLACE, np.int32)
        for token, text in decoded.items():
            lengths[token] = len(text)
        overlaps, places = zip(*(_matches(decoded, string) for string in wanted), strict=True)
        if not any(overlaps):
            raise ValueError(
                "Stop string preprocessing was unable to identify tokens matching one or more of the supplied stop "
                f"string(s), {[*strings]}: no token of this tokenizer ends them. This is most often caused by the stop "
                "strings containing unusual characters that are not in the tokenizer vocabulary."
            )
        places_for = bucket(max(len(wanted), _MIN_STRINGS))
        return cls(
            overlaps=_table(overlaps, rows),
            places=_table(places, rows),
            lengths=lengths,
            targets=[*map(len, wanted), *[2**30] * (places_for - len(wanted))],
            window=bucket(max(_MIN_WINDOW, *map(len, wanted))),
        )

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool [N] for int32 [N, S] tokens of which `cur_len` columns are valid."""
        columns = cur_len - 1 - jnp.arange(min(self.window, input_ids.shape[1]))  # the newest token first
        nobody = len(self.lengths) - 1
        tokens = jnp.where(columns[None] >= 0, jnp.take(input_ids, columns, axis=1, mode="clip"), nobody)
        ends = self.overlaps[tokens[:, 0]].astype(jnp.int32)  # [N, M, E]
        earlier = jnp.cumsum(self.lengths[tokens[:, 1:]], axis=1)
        # How far each token reaches, for each way in which the newest may overlap the end.
        reached = jnp.concatenate(
            [ends[:, None], ends[:, None] + earlier[:, :, None, None]], axis=1
        )  # [N, window, M, E]
        fits = (reached[:, :-1, :, None] == self.places[tokens[:, 1:]][..., None].astype(jnp.int32)).any(axis=3)
        fits = jnp.concatenate([ends[:, None] > 0, fits], axis=1)
        so_far = jnp.cumprod(fits, axis=1).astype(bool)
        return ((reached >= self.targets[None, None, :, None]) & so_far).any(axis=(1, 2, 3))


def _table(strings: Sequence[dict[int, list[int]]], rows: int) -> Any:
    """int16 [V + 1, M, T] of the numbers of each token for each string."""
    most = max((len(numbers) for string in strings for numbers in string.values()), default=1)
    shape = rows + 1, bucket(max(len(strings), _MIN_STRINGS)), bucket(max(most, _MIN_NUMBERS))
    table = np.full(shape, _NO_PLACE, np.int16)
    for place, string in enumerate(strings):
        for token, numbers in string.items():
            table[token, place, : len(numbers)] = numbers
    with jax.ensure_compile_time_eval():  # kept for other calls, whoever traces this one
        return jnp.asarray(table)


Numbers = dict[int, list[int]]


def _matches(decoded: dict[int, Any], string: Any) -> tuple[Numbers, Numbers]:
    """Of the tokens that can be part of a string: their overlaps with its end, and their places within it."""
    overlaps, places = {}, {}
    characters, size = set(string), len(string)
    for token, text in decoded.items():
        if not text or not (text[0] in characters or text[-1] in characters or string in text):
            continue
        # The token up to its k-th character ends as the string does, or is the end of it.
        ends = (min(k, size) for k in range(1, len(text) + 1) if text[:k].endswith(string[-min(k, size) :]))
        # What is left of the string before a place ends with the token, or is an end of the token.
        within = (i for i in range(1, size) if text.endswith(string[max(0, size - i - len(text)) : size - i]))
        for found, numbers in ((overlaps, ends), (places, within)):
            if numbers := list(dict.fromkeys(numbers)):
                found[token] = numbers
    return overlaps, places


@dataclass(frozen=True)
class _Vocabulary:
    """What every token of a tokenizer reads as, in bytes if it works on bytes, and what was built from that."""

    size: int
    decoded: dict[int, Any]
    in_bytes: bool
    kept: dict[tuple[tuple[str, ...], int], StopStrings]


_vocabularies: weakref.WeakKeyDictionary[Any, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> _Vocabulary:
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


def _byte_form(tokenizer: Any) -> str | None:
    """How tokens stand for bytes: "ByteFallback" (<0x0A>), "ByteLevel" (a character for each), or not at all."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    settings = decoder.__getstate__()
    settings = settings.decode() if isinstance(settings, bytes) else str(settings)
    return next(
        (form for form in ("ByteFallback", "ByteLevel") if f'"type":"{form}"' in settings.replace(" ", "")), None
    )


def _decoded(tokenizer: Any, form: str | None) -> dict[int, Any]:
    # A token by itself may lose the space it begins with, so it is read after others, which are then taken off.
    before = "abcdef"
    base = tokenizer.convert_ids_to_tokens(tokenizer(before, add_special_tokens=False)["input_ids"])
    characters = lazy.byte_characters() if form == "ByteLevel" else {}
    decoded: dict[int, Any] = {}
    for token, number in tokenizer.get_vocab().items():
        if form == "ByteLevel" and all(character in characters for character in token):
            decoded[number] = bytes(characters[character] for character in token)
        elif form == "ByteFallback" and re.fullmatch("<0x[0-9a-fA-F]{2}>", token):
            decoded[number] = bytes([int(token[3:5], 16)])
        else:
            text = tokenizer.convert_tokens_to_string([*base, token])
            if before not in text:
                raise ValueError(
                    f"`stop_strings` need to know how each token reads, but this `tokenizer` reads {[*base, token]} as "
                    f"{text!r}: it cannot spell {before!r}. Use a criterion of your own."
                )
            text = text[text.index(before) + len(before) :]
            decoded[number] = text if form is None else text.encode()
    return decoded

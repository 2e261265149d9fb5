"""Stop strings: what transformers' criterion finds, this one finds, over tokenizers of every kind."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jaxgen
from jaxgen.processors.stop_strings import StopStrings

TEXT = (
    "Once upon a time a small fox met an owl. „Grüß Gott“, said the fox; 今日は, said the owl, and they ate 12 "
    "crêpes 🥞🥞 by the river. Stop! The topper stopped at the last stop, opposite the shop. "
)


def byte_level() -> Any:
    """As GPT-2's and Llama 3's: every byte of a token is a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"])  # pyright: ignore
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback() -> Any:
    """As Llama 1's and 2's: characters out of the vocabulary are tokens like <0xE4>, and a space is ▁."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted({*TEXT[:60]} - {" "})]
    words = [("▁", "s"), ("t", "o"), ("o", "p"), ("▁", "t"), ("▁t", "o"), ("o", "n"), ("▁", "f")]
    words = [(a, b) for a, b in words if a in [*pieces, "▁t"] and b in pieces]
    pieces += [a + b for a, b in words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, words, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@jax.jit
def stopped(rule: StopStrings, input_ids: jax.Array, cur_len: jax.Array) -> jax.Array:
    return rule(input_ids, jnp.zeros((len(input_ids), 1)), cur_len)


TOKENIZERS = {
    "bundled": lambda: AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL),
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hundred_sets_of_strings_stop_where_those_of_transformers_do(name: str) -> None:
    """At every length of a text: strings within tokens and over them, in one piece or in bytes, one or several."""
    import torch
    from transformers import StopStringCriteria

    tokenizer, rng, found = TOKENIZERS[name](), np.random.default_rng(0), 0
    for _ in range(100):
        rows = [TEXT[start:] for start in rng.integers(0, len(TEXT) - 60, 2)]
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:24] for text in rows]
        ids = np.array([row[: min(map(len, encoded))] for row in encoded])
        strings = []
        for _ in range(int(rng.integers(1, 4))):
            start = int(rng.integers(0, len(rows[0]) - 12))
            strings.append(rows[0][start : start + int(rng.integers(1, 9))])
        expected = StopStringCriteria(tokenizer, strings)
        ours = StopStrings.build(strings, tokenizer, len(tokenizer))
        buffer = np.zeros((2, 32), np.int32)
        buffer[:, : ids.shape[1]] = ids
        for length in range(1, ids.shape[1] + 1):
            stops = np.asarray(stopped(ours, buffer, length))
            np.testing.assert_array_equal(stops, expected(torch.tensor(ids[:, :length]), None), err_msg=str(strings))
            found += int(stops.sum())
    assert found > 20


@pytest.mark.oracle
def test_many_long_strings_and_those_of_one_character_stop_where_those_of_transformers_do() -> None:
    """More strings, places and tokens than the smallest tables have room for."""
    import torch
    from transformers import StopStringCriteria

    tokenizer = byte_level()
    text = TEXT[:90] + "-" * 30 + TEXT[90:]
    strings = [TEXT[20:90], "-" * 25, "the owl, and they", "zebra", TEXT[100:130]]
    encoded = [piece for each in text for piece in tokenizer(each, add_special_tokens=False)["input_ids"]]
    ids = np.array([encoded])  # a token for each character
    ours = StopStrings.build(strings, tokenizer, len(tokenizer))
    assert ours.window > 64 and ours.overlaps.shape[1] > 4 and max(ours.overlaps.shape[2], ours.places.shape[2]) > 12
    theirs, buffer = StopStringCriteria(tokenizer, strings), np.zeros((1, 400), np.int32)
    buffer[:, : ids.shape[1]] = ids
    found = []
    for length in range(1, ids.shape[1] + 1):
        stops = bool(stopped(ours, buffer, length)[0])
        assert stops == bool(theirs(torch.tensor(ids[:, :length]), None)[0]), text[:length]
        found += [length] * stops
    assert len(found) > 3


class Words:
    """A tokenizer of whole words, as the table in the documentation of transformers' criterion has them."""

    def __init__(self, *words: str):
        self.words = words

    def __len__(self) -> int:
        return len(self.words) + 1

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate([*self.words, "abcdef"])}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.get_vocab()[text]]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [[*self.words, "abcdef"][token] for token in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        ("st op", True), ("stop", True), ("sto p", True), ("las top", True), ("las to per", True),
        ("s top", True), ("a st op", True), ("s t o p", True), ("las to p", True), ("sto pper", True),
        ("s to p e", False), ("stop a", False), ("st op a", False), ("t op", False), ("sto", False),
    ],
)  # fmt: skip
def test_stop_is_found_where_its_end_is_in_the_last_token(tokens: str, stops: bool) -> None:
    words = Words("st", "op", "stop", "sto", "p", "pper", "las", "to", "top", "per", "s", "a", "t", "o", "e")
    ids = [words.get_vocab()[word] for word in tokens.split()]
    buffer = np.array([[*ids, *[0] * 4]], np.int32)
    found = stopped(StopStrings.build(["stop"], words, len(words)), buffer, len(ids))
    assert found.tolist() == [stops]


def test_the_tables_hold_overlaps_and_places_counted_from_the_end() -> None:
    words = Words("last", "top", "topper", "s", "p")
    rule = StopStrings.build(["stop"], words, len(words))
    numbers = [
        [sorted({*row.tolist()} - {-1}) for row in np.asarray(table[:5, 0])] for table in (rule.overlaps, rule.places)
    ]
    assert numbers == [[[], [3], [3], [], [1]], [[2], [], [], [3], []]]
    assert rule.lengths[:5].tolist() == [4, 3, 6, 1, 1]


def test_strings_that_no_token_can_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unable to identify tokens.*\['zz'\]: no token of this tokenizer ends them"):
        StopStrings.build(["zz"], Words("top"), 3)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, pytest.param({"eos_token_id": None}, marks=pytest.mark.sweep)], ids=str
)
def test_generated_texts_stop_as_in_transformers(more: Any, bundled: Any, one_layer: Path, tokenizer: Any) -> None:
    import torch
    from oracle import torch_model

    twin = torch_model(one_layer)
    prompts = tokenizer(
        ["Once upon a time", "One day, a small fox", "Pip the mouse"], padding=True, return_tensors="np"
    )
    tensors = {name: torch.tensor(array) for name, array in prompts.items()}
    plain = tokenizer.batch_decode(jaxgen.generate(bundled, **prompts, max_new_tokens=40), skip_special_tokens=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        strings = [text[start : start + int(rng.integers(1, 8))] for text in plain for start in rng.integers(30, 90, 1)]
        arguments = {"max_new_tokens": 40, "stop_strings": strings[: int(rng.integers(1, 3))], "tokenizer": tokenizer}
        ours = jaxgen.generate(bundled, **prompts, **arguments, **more)
        np.testing.assert_array_equal(ours, twin.generate(**tensors, **arguments, **more), err_msg=str(strings))


def test_other_strings_compile_nothing_and_the_same_ones_build_nothing(bundled: Any, tokenizer: Any) -> None:
    def stopped(strings: Any) -> np.ndarray:
        return jaxgen.generate(
            bundled, **tokenizer("Once upon a time", return_tensors="np"), max_new_tokens=30, stop_strings=strings,
            tokenizer=tokenizer,
        )  # fmt: skip

    stopped(["the"])
    before = jaxgen.compile_counts()
    for strings in ("rabbit", ["fox", "run"], ["."]):
        stopped(strings)
    assert jaxgen.compile_counts() == before
    built = [StopStrings.build(["fox", "run"], tokenizer, bundled.vocab_size) for _ in range(2)]
    assert built[0] is built[1]


def test_a_call_prepared_within_a_trace_leaves_nothing_of_it_behind(bundled: Any, tokenizer: Any) -> None:
    arguments = {"stop_strings": ["qu"], "tokenizer": tokenizer, "max_new_tokens": 5, "eos_token_id": None}

    @jax.jit
    def length(x: jax.Array) -> jax.Array:
        call = jaxgen.prepare(bundled, [[5, 6]], **arguments)
        return jaxgen.decode(bundled, call)["length"] + x

    assert int(length(jnp.int32(0))) == jaxgen.generate(bundled, [[5, 6]], **arguments).shape[1]


@pytest.mark.oracle
def test_transformers_own_criterion_takes_the_place_of_the_strings(bundled: Any, tokenizer: Any) -> None:
    from transformers import StopStringCriteria

    prompt = tokenizer("Once upon a time", return_tensors="np")
    plain = jaxgen.generate(bundled, **prompt, max_new_tokens=30)
    out = jaxgen.generate(
        bundled, **prompt, max_new_tokens=30, stop_strings=["flowers"], tokenizer=tokenizer,
        stopping_criteria=[StopStringCriteria(tokenizer, ["morning"])],
    )  # fmt: skip
    assert "flowers" in tokenizer.decode(out[0]) and tokenizer.decode(out[0]).endswith("morning")
    np.testing.assert_array_equal(out[0], plain[0, : out.shape[1]])


@pytest.mark.parametrize("wrong", ["here", 3, object()], ids=["a name", "a number", "an object"])
def test_what_is_no_tokenizer_is_refused(wrong: Any, bundled: Any) -> None:
    with pytest.raises(ValueError, match=r"`tokenizer`=.* must be the model's tokenizer"):
        jaxgen.generate(bundled, [[5, 6]], max_new_tokens=3, stop_strings="the", tokenizer=wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop_strings": "the"}, "There are one or more stop strings.*could not locate a tokenizer"),
        ({"stop_strings": ["the", ""]}, "`stop_strings`=.*none of them empty"),
        ({"stop_strings": [5]}, "`stop_strings`=.5. must be a string or a list of strings"),
        ({"stop_strings": "x" * 1001}, "a string of more than 1000 characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_is_refused_before_anything_is_compiled(arguments: Any, message: str, bundled: Any) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(bundled, [[5, 6]], max_new_tokens=3, **arguments)
    assert jaxgen.compile_counts() == before

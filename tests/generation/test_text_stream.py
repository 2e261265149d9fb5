"""Text as it comes: whatever the tokenizer, the pieces together are the text of all ids, and none is taken back."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgen
from jaxgen.generation.text_stream import TextPieces

TEXTS = [
    "Once upon a time, there was a fox.\n\nShe said: don't!",
    "日本語の文章です。",
    "🦊🐻 né 👩‍👩‍👧 한국어",
    "  two  spaces\t.",
]


def fast(tokenizer: Any, **kwargs: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **kwargs)


def byte_level() -> Any:
    """As Llama 3 and Qwen: a character that is rare is two to four ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer, clean_up_tokenization_spaces=True)  # as Llama 3 says, and transformers does not


def byte_fallback() -> Any:
    """As Llama 1 and 2: words begin with a space that the start of a text drops, rare characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁", "▁Once", "▁upon", "on", "▁a", "▁time", "s", "e", "本", "🦊", "▁</", "▁▁", "\n"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast(tokenizer, unk_token="<unk>")


def metaspace() -> Any:
    """A unigram model whose spaces before punctuation are cleaned up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["▁do", "▁n't", "n't", "▁'s", "▁'", "▁.", ".", "▁,", "▁!", "▁", "a", "'", "re", "▁'ve", "m", "s"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models

    names = ["[UNK]", "once", "up", "##on", "a", "time", ".", ",", "'", "s", "n", "##'t", "do", "not", "n't"]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return fast(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


MAKERS: list[Callable[[], Any]] = [byte_level, byte_fallback, metaspace, word_piece]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def pieces(tokenizer: Any, chunks: list[list[int]]) -> list[str]:
    text = TextPieces(tokenizer)
    return [*(text.add(chunk) for chunk in chunks), text.end()]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_are_together_the_text_of_all(any_tokenizer: Any, data: st.DataObject) -> None:
    ids = st.integers(0, len(any_tokenizer) - 1)
    chunks = data.draw(st.lists(st.lists(ids, max_size=6), max_size=8))
    whole = any_tokenizer.decode([each for chunk in chunks for each in chunk], skip_special_tokens=True)
    assert "".join(pieces(any_tokenizer, chunks)) == whole


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_spaces_stay_and_no_piece_holds_a_part_of_a_character(make: Callable[[], Any], text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = pieces(tokenizer, [[each] for each in ids])
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_text_comes_as_soon_as_it_is_sure() -> None:
    tokenizer = byte_level()
    ids = tokenizer("foxes 🦊 upon", add_special_tokens=False)["input_ids"]
    shown = pieces(tokenizer, [[each] for each in ids])
    assert "🦊" in "".join(shown[:-2]) and shown[-1] in ("", "upon")
    names = ["▁Once", "▁upon", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "▁a"]
    tokenizer = byte_fallback()
    shown = pieces(tokenizer, [[each] for each in tokenizer.convert_tokens_to_ids(names)])
    assert shown == ["Once", " upon", "", "", "", "", "🦊 a", ""]


def test_a_model_is_read_along(bundled: Any, tokenizer: Any) -> None:
    encoded = tokenizer("Once upon a time", return_tensors="np")
    output = jaxgen.generate(bundled, **encoded, max_new_tokens=40)[0]
    expected = tokenizer.decode(output[encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    for arguments in ({"inputs": "Once upon a time"}, dict(encoded), {"inputs": encoded["input_ids"]}):
        shown = list(jaxgen.stream_text(bundled, tokenizer, **arguments, max_new_tokens=40))
        assert "".join(shown) == expected and len(shown) > 3 and all(shown)
    stopped = "".join(
        jaxgen.stream_text(bundled, tokenizer, "Once upon a time", max_new_tokens=40, stop_strings="morning")
    )
    assert stopped.endswith("morning")


def test_more_than_one_text_is_refused_at_the_call(bundled: Any, tokenizer: Any) -> None:
    for arguments in ({"inputs": [[5], [6]]}, {"inputs": "a", "do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="`stream_text` follows one text, but the call makes 2"):
            jaxgen.stream_text(bundled, tokenizer, max_new_tokens=2, **arguments)

"""The bundled encoder-decoder: real, small, and its corrections are those of transformers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_decoders import torch_generate, torch_model

import jaxgen

EXAMPLES = Path(__file__).parents[1] / "examples"
WRONG = ["Oe fine moorning, Milo wnt foor a alk on the beach.", "The moon was bright, but Mlo oculd not sleep."]
RIGHT = ["One fine morning, Milo went for a walk on the beach.", "The moon was bright, but Milo could not sleep."]


@pytest.fixture(scope="module")
def speller() -> Any:
    return jaxgen.load(jaxgen.BUNDLED_SPELLER)


@pytest.fixture(scope="module")
def twin() -> Any:
    """The same model in torch."""
    return torch_model(jaxgen.BUNDLED_SPELLER)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return jaxgen.load_tokenizer(jaxgen.BUNDLED_SPELLER)


def test_it_takes_at_most_four_megabytes() -> None:
    assert sum(file.stat().st_size for file in jaxgen.BUNDLED_SPELLER.iterdir()) <= 4_000_000


@pytest.mark.parametrize("beams", [1, 4])
def test_it_corrects_sentences(beams: int, speller: Any, tokenizer: Any) -> None:
    sources = tokenizer(WRONG, return_tensors="np", padding=True)
    texts = jaxgen.generate(speller, **sources, num_beams=beams, max_new_tokens=30)
    assert tokenizer.batch_decode(texts, skip_special_tokens=True) == RIGHT


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4, "num_return_sequences": 3}], ids=["greedy", "beams"])
def test_its_corrections_are_those_of_transformers(
    arguments: dict[str, Any], speller: Any, twin: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_speller  # pyright: ignore

    wrong = [source for source, _ in itertools.islice(train_speller.pairs(9), 60)]
    for start in range(0, 60, 20):
        sources = dict(tokenizer(wrong[start : start + 20], return_tensors="np", padding="max_length", max_length=48))
        ours = jaxgen.generate(speller, **sources, max_new_tokens=24, **arguments)
        np.testing.assert_array_equal(ours, torch_generate(twin, **sources, max_new_tokens=24, **arguments))


@pytest.mark.oracle
@pytest.mark.parametrize("beams", [1, 4])
def test_a_stop_string_ends_a_correction_where_it_does_in_transformers(
    beams: int, speller: Any, twin: Any, tokenizer: Any
) -> None:
    sources = tokenizer(WRONG, return_tensors="np", padding=True)
    plain = jaxgen.generate(speller, **sources, num_beams=beams, max_new_tokens=30)
    for strings in ("walk on", ["ilo c", "orning", "not there"]):
        arguments = {"num_beams": beams, "max_new_tokens": 30, "stop_strings": strings, "tokenizer": tokenizer}
        ours = jaxgen.generate(speller, **sources, **arguments)
        np.testing.assert_array_equal(ours, torch_generate(twin, **sources, **arguments))
        assert ours.shape != plain.shape or (ours != plain).any()


def test_the_script_that_trains_it_lowers_the_loss_and_counts_what_is_corrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_speller  # pyright: ignore

    monkeypatch.setattr(train_speller, "ROWS", 8)
    batches = train_speller.encode(train_speller.pairs(0), train_speller.speller_tokenizer())
    held_out = next(batches)
    model = jaxgen.from_config(train_speller.CONFIG, key=0)
    before = float(train_speller.text_loss(model, held_out))
    trained = train_speller.train(model, batches, 12)
    assert float(train_speller.text_loss(trained, held_out)) < before - 0.5
    assert train_speller.corrected(trained, [held_out]) == 0
    assert train_speller.corrected(jaxgen.load(jaxgen.BUNDLED_SPELLER), [held_out]) >= 0.75

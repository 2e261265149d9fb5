"""The bundled checkpoint: real, small, and continued as transformers continues it."""

from typing import Any

import numpy as np
import pytest
from oracle import torch_generate, torch_model

import jaxgen


@pytest.fixture(scope="module")
def bundled() -> Any:
    return jaxgen.load(jaxgen.BUNDLED_MODEL)


def test_it_takes_at_most_six_megabytes() -> None:
    assert sum(file.stat().st_size for file in jaxgen.BUNDLED_MODEL.iterdir()) <= 6_000_000


def test_it_tells_a_story_that_comes_to_an_end(bundled: Any, tokenizer: Any) -> None:
    encoded = tokenizer(["Once upon a time"], return_tensors="np")
    output = jaxgen.generate(bundled, **encoded, max_new_tokens=300)
    story = tokenizer.decode(output[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time") and story.rstrip().endswith((".", "!", "?", '"'))
    assert output[0, -1] == tokenizer.eos_token_id
    assert 40 <= len(story.split()) <= 200


@pytest.mark.oracle
def test_two_hundred_prompts_continue_as_with_transformers(bundled: Any, tokenizer: Any) -> None:
    twin = torch_model(jaxgen.BUNDLED_MODEL)
    rng = np.random.default_rng(0)
    openings = ["Once upon a time", "One day", "The little fox", "Mia", "It was raining", '"Hello', "Zebra 123", ""]
    story = tokenizer.decode(jaxgen.generate(bundled, [[1]], max_new_tokens=200)[0], skip_special_tokens=True).split()
    for _ in range(10):
        prompts = [
            " ".join([openings[rng.integers(len(openings))], *story[start : start + rng.integers(0, 20)]])
            for start in rng.integers(0, len(story) - 20, 20)
        ]
        encoded = tokenizer(prompts, return_tensors="np", padding=True)
        theirs = torch_generate(twin, **encoded, max_new_tokens=64)
        np.testing.assert_array_equal(jaxgen.generate(bundled, **encoded, max_new_tokens=64), theirs)


def test_padded_and_unpadded_prompts_continue_alike(bundled: Any, tokenizer: Any) -> None:
    texts = ["One day", "Once upon a time, there was a little fox"]
    together = jaxgen.generate(bundled, **tokenizer(texts, return_tensors="np", padding=True), max_new_tokens=30)
    for row, text in zip(together, texts, strict=True):
        alone = jaxgen.generate(bundled, **tokenizer([text], return_tensors="np"), max_new_tokens=30)
        kept = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (row, alone[0])]
        assert kept[0] == kept[1]

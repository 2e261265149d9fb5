"""Prompts cut within a word go on with a token that extends it, as in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import torch_model

import jaxgen

CUT = ["Once upon a time ther", "The little bun", "Lil", "Once upon a ti", "fox", "T", "  The little "]


@pytest.fixture(scope="module")
def twin(one_layer: Path) -> Any:
    return torch_model(one_layer)


@pytest.fixture(scope="module")
def healer() -> Any:
    """The tokenizer of the stories, padding on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL, padding_side="left")


@pytest.mark.oracle
@pytest.mark.parametrize("texts", [[text] for text in CUT] + [CUT[:4]], ids=lambda texts: f"{texts[0]} ({len(texts)})")
def test_healed_prompts_and_what_follows_equal_transformers(
    bundled: Any, twin: Any, healer: Any, texts: list[str]
) -> None:
    import torch

    ids = healer(texts, return_tensors="np", padding=True)["input_ids"]
    arguments = {"max_new_tokens": 8, "token_healing": True, "tokenizer": healer}
    expected = twin.generate(torch.tensor(ids), **arguments)
    np.testing.assert_array_equal(jaxgen.generate(bundled, ids, **arguments), expected)


def test_a_healed_prompt_need_not_end_where_the_tokenizer_cut_it(bundled: Any, healer: Any) -> None:
    ids = healer(["The little bun"], return_tensors="np")["input_ids"]
    plain = jaxgen.generate(bundled, ids, max_new_tokens=1)
    healed = jaxgen.generate(bundled, ids, max_new_tokens=1, token_healing=True, tokenizer=healer)
    assert healed[0, ids.shape[1] - 1] != plain[0, ids.shape[1] - 1]
    assert healer.decode(healed[0, : ids.shape[1]], skip_special_tokens=True).startswith("The little bun")


def test_a_prompt_of_another_length_is_refused_beside_a_mask_with_padding(bundled: Any, healer: Any) -> None:
    ids = healer(["  The  li"], return_tensors="np")["input_ids"]
    mask = np.arange(ids.shape[1])[None] > 0
    with pytest.raises(ValueError, match="Heal one prompt at a time"):
        jaxgen.generate(bundled, ids, attention_mask=mask, token_healing=True, tokenizer=healer, max_new_tokens=2)


def test_a_key_decides_what_a_checkpoint_that_samples_heals(one_layer: Path, healer: Any) -> None:
    model = jaxgen.load(one_layer)
    model.generation_config.do_sample, model.generation_config.temperature = True, 8.0
    ids = np.repeat(healer(["b"], return_tensors="np")["input_ids"], 2, axis=0)
    arguments = {"token_healing": True, "tokenizer": healer, "max_new_tokens": 3}
    for key in (3, [3, 4]):
        once, again = (jaxgen.generate(model, ids, key=key, **arguments) for _ in range(2))
        np.testing.assert_array_equal(once, again)

"""An assistant with another tokenizer: tables between the tokens, and drafts that the model may take."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxgen
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.translation import translation

TEXTS = ["Once upon a time", "One day, a small fox"]
MORE = 24  # tokens that only the assistant has


@pytest.fixture(scope="module")
def order(bundled: Any) -> np.ndarray:
    """int [V]: the assistant's id of each of the model's tokens."""
    return np.random.default_rng(0).permutation(bundled.vocab_size)


@pytest.fixture(scope="module")
def assistant_tokenizer(order: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled tokenizer with its tokens in another order, and some more."""
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = {text: int(order[token]) for text, token in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocab | {f"<more {number}>": len(order) + number for number in range(MORE)}
    for added in content["added_tokens"]:
        added["id"] = int(order[added["id"]])
    for special in content["post_processor"]["special_tokens"].values():
        special["ids"] = [int(order[token]) for token in special["ids"]]
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def assistant(bundled: Any, order: np.ndarray) -> Any:
    """The bundled model for these ids."""
    config = bundled.config.to_json()
    other = jaxgen.from_config({**config, "vocab_size": config["vocab_size"] + MORE})
    back = np.argsort(order)

    def moved(path: Any, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        if ours.shape == theirs.shape:
            return theirs
        return jnp.concatenate([theirs[back], jnp.zeros_like(ours[len(back) :])])

    leaves = jax.tree.leaves(bundled)
    paths, treedef = jax.tree_util.tree_flatten_with_path(other)
    return jax.tree.unflatten(
        treedef, [moved(path, ours, leaf) for (path, ours), leaf in zip(paths, leaves, strict=True)]
    )


@pytest.mark.parametrize("samples", [False, True])
def test_a_model_with_other_ids_for_the_same_tokens_drafts_what_the_model_says(
    samples: bool, bundled: Any, tokenizer: Any, assistant: Any, assistant_tokenizer: Any
) -> None:
    prompts = tokenizer(TEXTS, padding=True, return_tensors="np")
    keywords = {**prompts, "max_new_tokens": 33, "eos_token_id": None, "do_sample": samples, "key": 2}
    plain = jaxgen.generate(bundled, **keywords)
    ours = jaxgen.generate(
        bundled,
        assistant_model=assistant,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        num_assistant_tokens=3,
        assistant_confidence_threshold=0.0,
        return_dict_in_generate=True,
        **keywords,
    )
    np.testing.assert_array_equal(ours.sequences, plain)
    np.testing.assert_array_equal(ours.rounds, 1 + 32 // 4)


def test_tokens_that_the_assistant_has_not_are_spelled_in_its_own(bundled: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The assistant has letters only: it reads words letter by letter, and drafts hardly any."""
    AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    special = {added["content"] for added in content["added_tokens"]}
    kept = [text for text in vocab if len(text) == 1 or text in special]
    content["model"]["vocab"] = {text: number for number, text in enumerate(kept)}
    content["model"]["merges"] = []
    for added in content["added_tokens"]:
        added["id"] = content["model"]["vocab"][added["content"]]
    for special in content["post_processor"]["special_tokens"].values():
        special["ids"] = [content["model"]["vocab"][text] for text in special["tokens"]]
    file.write_text(json.dumps(content))
    letters = AutoTokenizer.from_pretrained(tmp_path)
    model = jaxgen.from_config({**bundled.config.to_json(), "vocab_size": len(kept) + 100})
    prompts = tokenizer(TEXTS, padding=True, return_tensors="np")
    inputs = Inputs(prompts["input_ids"], prompts["attention_mask"], prompts["attention_mask"], 1)
    tables = translation(tokenizer, letters, bundled.vocab_size, model.vocab_size, inputs, 2)
    upon = tokenizer(" upon", add_special_tokens=False)["input_ids"]
    (token,) = upon
    assert tables.same[token] == -1
    assert letters.convert_ids_to_tokens(tables.pieces[token][: tables.counts[token]].tolist())[-1] in "nou"
    assert letters.decode(
        np.asarray(tables.prompt.input_ids)[0][np.asarray(tables.prompt.attention_mask)[0]]
    ).strip() in (
        "Once upon a time",
        f"{letters.bos_token}Once upon a time",
    )
    keywords = {**prompts, "max_new_tokens": 20}
    ours = jaxgen.generate(
        bundled,
        assistant_model=model,
        tokenizer=tokenizer,
        assistant_tokenizer=letters,
        num_assistant_tokens=3,
        **keywords,
    )
    np.testing.assert_array_equal(ours, jaxgen.generate(bundled, **keywords))


def test_an_assistant_whose_vocabulary_is_padded_much_further_takes_the_same_tokenizer_twice(
    bundled: Any, tokenizer: Any, assistant: Any
) -> None:
    call = {"inputs": np.array([[5, 6]]), "max_new_tokens": 3, "tokenizer": tokenizer}
    ours = jaxgen.generate(bundled, assistant_model=assistant, assistant_tokenizer=tokenizer, **call)
    np.testing.assert_array_equal(ours, jaxgen.generate(bundled, **call))


def test_both_tokenizers_are_asked_for_and_only_where_they_differ(
    bundled: Any, tokenizer: Any, assistant: Any, assistant_tokenizer: Any
) -> None:
    call = {"inputs": np.array([[5, 6]]), "max_new_tokens": 3, "assistant_tokenizer": assistant_tokenizer}
    with pytest.raises(ValueError, match="`assistant_tokenizer` needs the tokenizer of the model too"):
        jaxgen.generate(bundled, assistant_model=assistant, **call)
    with pytest.raises(ValueError, match="`assistant_tokenizer` is for an assistant with another tokenizer"):
        jaxgen.generate(
            bundled, assistant_model=bundled, tokenizer=tokenizer, **{**call, "assistant_tokenizer": tokenizer}
        )

"""The tokens of transformers at the sizes of real use: prompts of hundreds of tokens, vocabularies of thousands.

Many paths are taken from some size on only: attention of some columns after the others, scores in blocks, bisection in
the place of sorting, caches that grow. `tests/scripts/mutants.py` breaks each of them and names the test that notices.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import LARGE, REAL_SIZES, SMALL, RealSize
from oracle import HAS_TORCH, live, recorded, torch_generate, torch_model
from shared_noise import in_jaxgen, in_torch

import jaxgen

PLAIN: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", autouse=True)
def shared_numbers() -> Iterator[None]:
    """All programs of this file draw with the numbers of transformers, so that tests share them."""
    with in_jaxgen():
        yield


class Case:
    """A model of a real size, its twin in torch, and what it is asked."""

    def __init__(self, size: RealSize, folder: Any):
        self.size, self.columns = size, size.columns
        self.folder = size.write(folder)
        self.model = jaxgen.load(self.folder)
        self.twin = torch_model(self.folder) if HAS_TORCH else None
        self.ids, self.mask = size.prompts()
        self.expected = np.array(recorded()[size.name])

    def generate(self, **kwargs: Any) -> Any:
        return jaxgen.generate(self.model, **{"inputs": self.ids, "attention_mask": self.mask, **PLAIN, **kwargs})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(SMALL, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(LARGE, tmp_path_factory.mktemp("large"))


def assert_they_differ(tokens: np.ndarray) -> None:
    """Rows and steps, or a test could not tell right from wrong."""
    assert tokens.shape[1] > 1
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
    for row in tokens:
        assert len(np.unique(row)) > len(row) // 3


# ---- Greedy ----


@pytest.mark.parametrize("size", REAL_SIZES, ids=lambda size: size.name)
def test_greedy_tokens_after_long_prompts_equal_transformers(size: RealSize, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue("small" if size is SMALL else "large")
    ours = case.generate(max_new_tokens=size.new_tokens)
    assert_they_differ(ours[:, case.columns :])
    np.testing.assert_array_equal(ours, case.expected)
    if HAS_TORCH:
        np.testing.assert_array_equal(ours, live(size, case.folder))


@pytest.mark.oracle
@pytest.mark.parametrize("rows", [1, 40])
def test_one_row_and_forty_of_them_equal_transformers(rows: int, small: Case) -> None:
    """Products take other forms for one row, for up to 32, and for more."""
    ids = np.random.default_rng(rows).integers(3, 1000, (rows, 20))
    arguments = {**PLAIN, "max_new_tokens": 16}
    ours: Any = jaxgen.generate(small.model, ids, **arguments)
    assert_they_differ(ours[:, 20:])
    mask = np.ones_like(ids)
    np.testing.assert_array_equal(ours, torch_generate(small.twin, ids, attention_mask=mask, **arguments))


@pytest.mark.parametrize("chunk", [256, 150])
def test_a_long_prompt_in_chunks_gives_the_tokens_of_the_whole(chunk: int, large: Case) -> None:
    new = 24
    ours = large.generate(prefill_chunk_size=chunk, max_new_tokens=new)
    np.testing.assert_array_equal(ours, large.expected[:, : large.columns + new])


def test_chunks_of_more_columns_than_have_their_scores_in_memory_give_the_same_tokens(large: Case) -> None:
    new = 24
    ours = large.generate(prefill_chunk_size=512, max_new_tokens=new)
    np.testing.assert_array_equal(ours, large.expected[:, : large.columns + new])


def test_four_hundred_columns_on_a_kept_cache_of_three_hundred_give_the_tokens_of_the_whole(large: Case) -> None:
    new, seen = 24, 300
    # The last row is all padding up to there, as a prompt of its own would not be.
    start = large.generate(
        inputs=large.ids[:, :seen], attention_mask=large.mask[:, :seen], max_new_tokens=1, return_dict_in_generate=True
    )
    assert start.past_key_values.get_seq_length() == seen
    ours = large.generate(past_key_values=start.past_key_values, max_new_tokens=new)
    np.testing.assert_array_equal(ours, large.expected[:, : large.columns + new])


def test_a_cache_that_grows_behind_a_long_prompt_gives_the_same_tokens(small: Case) -> None:
    """From 512 slots to those of a call that may go on, which a criterion of the caller's ends."""
    length = small.columns + small.size.new_tokens

    def long_enough(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.broadcast_to(cur_len >= length, len(input_ids))

    before = jaxgen.compile_counts()["grow"]
    ours = small.generate(max_new_tokens=1000, stopping_criteria=[long_enough])
    assert jaxgen.compile_counts()["grow"] == before + 1
    np.testing.assert_array_equal(ours, small.expected)


@pytest.mark.oracle
def test_attentions_and_hidden_states_of_a_long_prompt_equal_transformers(small: Case) -> None:
    import torch

    twin = torch_model(small.folder)
    twin.set_attn_implementation("eager")
    flags = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    arguments = {**PLAIN, **flags, "max_new_tokens": 2}
    theirs = twin.generate(torch.tensor(small.ids), attention_mask=torch.tensor(small.mask), **arguments)
    ours = small.generate(max_new_tokens=2, **flags)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    # Columns of padding attend nothing here and everything there.
    for mine, other in zip(ours.attentions[0], theirs.attentions[0], strict=True):
        expected = np.where(small.mask[:, None, :, None], other.numpy(), 0)
        np.testing.assert_allclose(mine, expected, atol=1e-4)
    for mine, other in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
        np.testing.assert_allclose(mine[small.mask > 0], other.numpy()[small.mask > 0], atol=1e-3)


# ---- Sampling ----

# Peaked scores leave a nucleus of a few candidates beside which the others count for nothing, or for a quarter of the
# mass, and flat ones a nucleus of thousands.
PEAKED, BETWEEN, FLAT = 0.25, 0.6, 1.3
DRAWS: dict[str, list[dict[str, Any]]] = {
    "the usual rules": [
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 0, "top_p": 0.9, "temperature": PEAKED},
        {"top_k": 0, "top_p": 0.9, "temperature": FLAT},
        {"top_k": 300, "temperature": FLAT},
        {"top_k": 0, "top_p": 0.75, "temperature": BETWEEN},
        {"top_k": 70, "top_p": 0.75, "temperature": BETWEEN},
        {"top_k": 5000, "top_p": 0.99, "temperature": FLAT},
        {"top_k": 0, "temperature": FLAT},
    ],
    "min_p too": [
        {"top_k": 0, "min_p": 0.05, "temperature": FLAT},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.2},
        {"top_k": 0, "top_p": 0.75, "min_p": 0.02, "temperature": BETWEEN},
        {"top_k": 100, "min_p": 0.01},
    ],
    "typical_p too": [
        {"top_k": 0, "typical_p": 0.9},
        {"top_k": 50, "top_p": 0.95, "typical_p": 0.5},
        {"top_k": 0, "top_p": 0.9, "typical_p": 0.7, "temperature": PEAKED},
        {"top_k": 200, "typical_p": 0.3, "temperature": FLAT},
    ],
}


@pytest.mark.oracle
@pytest.mark.parametrize("rules", DRAWS)
def test_draws_from_fifty_thousand_tokens_equal_transformers_with_the_same_noise(rules: str, large: Case) -> None:
    assert_draws_equal(large, DRAWS[rules], 10)


@pytest.mark.oracle
def test_draws_from_a_thousand_tokens_equal_transformers_with_the_same_noise(small: Case) -> None:
    draws = [{"top_k": 0, "temperature": FLAT}, {"top_k": 100, "top_p": 0.9}]
    draws += [{"top_k": 0, "top_p": 0.9, "temperature": temperature} for temperature in (PEAKED, FLAT)]
    assert_draws_equal(small, [{**draw, "num_return_sequences": 2} for draw in draws], 16)


def assert_draws_equal(case: Case, draws: list[dict[str, Any]], new_tokens: int) -> None:
    drawn = []
    for draw in draws:
        arguments = {**PLAIN, **draw, "do_sample": True, "max_new_tokens": new_tokens}
        ours = case.generate(key=0, **arguments)
        with in_torch():
            theirs = torch_generate(case.twin, case.ids, attention_mask=case.mask, **arguments)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(draw))
        assert_they_differ(ours[:, case.columns :])
        drawn.append(ours)
    assert len({each.tobytes() for each in drawn}) == len(draws)


# ---- Beams ----


@pytest.mark.oracle
def test_beams_over_fifty_thousand_tokens_equal_transformers(large: Case) -> None:
    import torch

    flags = {"output_scores": True, "return_dict_in_generate": True}
    arguments = {**PLAIN, **flags, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 16}
    eos = None
    for _ in range(2):  # the second time with an end that a beam meets
        arguments["eos_token_id"] = eos
        mask = torch.tensor(large.mask)
        theirs = large.twin.generate(torch.tensor(large.ids), attention_mask=mask, **arguments)  # pyright: ignore
        ours = large.generate(**arguments)
        np.testing.assert_array_equal(ours.sequences, theirs.sequences)
        np.testing.assert_array_equal(ours.beam_indices, theirs.beam_indices)
        np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, rtol=1e-3)
        assert len(np.unique(ours.beam_indices)) > 6
        assert len({tuple(row) for row in ours.sequences.tolist()}) == 12
        assert eos is None or (ours.sequences[:, large.columns :] == eos).any()
        eos = int(ours.sequences[0, large.columns + 8])

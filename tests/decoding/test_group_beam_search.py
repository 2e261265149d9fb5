"""Diverse beam search: the beams of transformers 4.41, on record."""

from typing import Any

import jax
import numpy as np
import pytest
from removed_modes import CASES, PROGRAMS, diverse, recorded

import jaxgen

IDS = [[5, 6, 7], [8, 9, 10], [3, 4, 5]]


def beams(model: Any, **kwargs: Any) -> Any:
    arguments = {
        "attention_mask": np.ones((3, 3), int), "num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 4,
        "diversity_penalty": 1.5, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    return jaxgen.generate(model, IDS, **{**arguments, **kwargs})


@pytest.mark.parametrize(
    "program", [0, 1, *(pytest.param(program, marks=pytest.mark.sweep) for program in range(2, PROGRAMS))]
)
def test_sequences_and_scores_are_those_of_transformers_4_41(program: int, model: Any) -> None:
    for case in range(program, CASES, PROGRAMS):
        call, expected = diverse(case), recorded()["diverse"][case]
        out = jaxgen.generate(model, **call, return_dict_in_generate=True, output_scores=True)
        np.testing.assert_array_equal(out.sequences, expected["sequences"], err_msg=str(call))
        np.testing.assert_allclose(out.sequences_scores, expected["sequences_scores"], rtol=1e-3)


def test_the_scores_of_a_beam_add_up_to_its_score_through_its_indices(model: Any) -> None:
    """Those of transformers 4.41 name rows of another group; here `compute_transition_scores` finds the beam's own."""
    out = beams(model, length_penalty=0.7, eos_token_id=[20, 30])
    scores = jaxgen.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    lengths = (out.beam_indices >= 0).sum(axis=1)
    ends = np.isin(out.sequences[np.arange(12), 2 + lengths], [20, 30])
    sums = scores.sum(axis=1) / lengths**0.7
    np.testing.assert_allclose(sums[~ends], out.sequences_scores[~ends], rtol=1e-4)


def test_a_higher_penalty_makes_the_groups_differ_more(model: Any) -> None:
    def first_tokens(penalty: float) -> float:
        rows = beams(model, diversity_penalty=penalty).sequences[:, 3:].reshape(3, 4, -1)
        return float(np.mean([len({tuple(row) for row in prompt[:, :1]}) for prompt in rows]))

    assert first_tokens(50.0) > first_tokens(1e-6)


def test_a_prompts_beams_do_not_depend_on_its_batch_mates(model: Any) -> None:
    together = beams(model, eos_token_id=[20, 30])
    for row in range(3):
        alone = jaxgen.generate(
            model, [IDS[row]], attention_mask=[[1, 1, 1]], num_beams=4, num_beam_groups=2, num_return_sequences=4,
            diversity_penalty=1.5, max_new_tokens=8, eos_token_id=[20, 30], pad_token_id=0,
        )  # fmt: skip
        np.testing.assert_array_equal(alone, together.sequences[4 * row : 4 * row + 4, : alone.shape[1]])


def test_new_numbers_compile_nothing(model: Any) -> None:
    beams(model)
    before = jaxgen.compile_counts()
    for change in ({"diversity_penalty": 0.3}, {"length_penalty": 2.0}, {"early_stopping": True}, {"pad_token_id": 4}):
        beams(model, **change)
    assert jaxgen.compile_counts() == before


def test_a_criterion_that_finishes_all_beams_at_once_ends_the_search(model: Any) -> None:
    out = beams(model, stopping_criteria=[lambda input_ids, scores, cur_len: cur_len >= 6])
    assert out.sequences.shape == (12, 6)
    np.testing.assert_array_equal(out.scores, beams(model).scores[:3])


def test_groups_start_with_finite_scores_for_users_who_debug_infinities(model: Any) -> None:
    call = jaxgen.prepare(model, IDS, num_beams=4, num_beam_groups=2, diversity_penalty=1.0, max_new_tokens=8)
    with jax.debug_infs(True):
        state = call.strategy.init(call.prompt, call.slots, model.vocab_size)
    assert all(np.isfinite(group.finished.scores).all() for group in state.groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 5}, "`num_beams`=5 must be a multiple of `num_beam_groups`=2"),
        ({"diversity_penalty": 0.0}, "`diversity_penalty`=0.0 must be above 0"),
        ({"diversity_penalty": -1.0}, "`diversity_penalty`=-1.0 must be above 0"),
        ({"do_sample": True}, "`do_sample`=True cannot be combined with `num_beam_groups`"),
        ({"num_beam_groups": 1}, "`diversity_penalty`=1.5 acts between groups of beams"),
        ({"num_beam_groups": 0}, "`num_beam_groups`=0 must be at least 1"),
        ({"num_beams": 1, "num_return_sequences": 1}, "`num_beams`=1 must be a multiple"),
    ],
    ids=str,
)
def test_is_refused_before_anything_is_compiled(arguments: Any, message: str, model: Any) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        beams(model, **arguments)
    assert jaxgen.compile_counts() == before

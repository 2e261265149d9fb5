"""Which mode a configuration asks for, and how its outputs are sorted by hand-made records of the device."""

from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from jaxgen.generation.config.resolve import resolve
from jaxgen.generation.modes import MODES, Mode, mode_for
from jaxgen.generation.modes.beam_search import BeamSearchMode
from jaxgen.generation.modes.beams import ancestors
from jaxgen.generation.modes.contrastive_search import ContrastiveSearchMode
from jaxgen.generation.modes.group_beam_search import GroupBeamSearchMode
from jaxgen.generation.modes.sampling import SamplingMode

BEAMS = {"num_beams": 4, "eos_token_id": [5, 6, 7]}
GROUPS = {**BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.5}
CANDIDATES = {"penalty_alpha": 0.6, "top_k": 3}


def mode(**fields: Any) -> Mode:
    return mode_for(resolve(GenerationConfig(), None, fields)[0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingMode),
        ({"do_sample": True, "num_return_sequences": 3}, SamplingMode),
        (BEAMS, BeamSearchMode),
        ({**BEAMS, "do_sample": True}, BeamSearchMode),
        (GROUPS, GroupBeamSearchMode),
        (CANDIDATES, ContrastiveSearchMode),
    ],
    ids=["greedy", "sampling", "beams", "beam sampling", "groups", "candidates"],
)
def test_fields_choose_the_mode(fields: dict[str, Any], expected: type) -> None:
    assert type(mode(**fields)) is expected and expected in MODES


@pytest.mark.parametrize(
    ("fields", "texts", "processor", "criterion", "keep"),
    [
        ({"do_sample": True, "num_return_sequences": 3}, 3, 3, 3, 1),
        (BEAMS, 4, 4, 16, 4),  # a criterion sees the candidates: 4 for each beam, one more than there are eos
        (GROUPS, 4, 2, 4, 4),
        (CANDIDATES, 1, 1, 1, 1),
    ],
    ids=["sampling", "beams", "groups", "candidates"],
)
def test_a_mode_says_how_many_texts_there_are(
    fields: dict[str, Any], texts: int, processor: int, criterion: int, keep: int
) -> None:
    found = mode(**fields)
    assert (found.sequences_per_prompt, found.rows_per_processor) == (texts, processor)
    assert (found.rows_per_criterion, found.min_tokens_to_keep) == (criterion, keep)


def test_beams_cannot_be_shown_before_the_end() -> None:
    for fields in (BEAMS, GROUPS):
        assert not mode(**fields).streams
        with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
            mode(**fields).check_streamer()
        with pytest.raises(ValueError, match="`stream` cannot follow `num_beams`=4"):
            mode(**fields).check_stream()
    assert mode().streams and mode(**CANDIDATES).streams


# Beams of three steps: in step 1 both continue beam 1, in step 2 they change places.
PARENTS = np.array([[[0, 0]], [[1, 1]], [[1, 0]]])


def test_ancestors_are_followed_from_step_to_step() -> None:
    found = [line[0].tolist() for line in ancestors(PARENTS, 3)]
    assert found == [[[0], [1]], [[1, 0], [1, 1]], [[1, 1, 0], [1, 0, 1]]]


def test_a_beam_attends_the_slots_of_its_ancestors() -> None:
    found = mode(num_beams=2).attended_steps({"parents": PARENTS}, rows=1, steps=3)
    assert [each[0].tolist() for each in found] == [[[0], [1]], [[1, 2], [1, 3]], [[1, 3, 4], [1, 2, 5]]]


def test_the_lineages_of_beams_are_rows_of_all_prompts() -> None:
    parents = np.concatenate([PARENTS, PARENTS], axis=1)
    found = mode(num_beams=2).lineages({"parents": parents}, rows=2, steps=2)
    assert [each.tolist() for each in found] == [[[0, 1, 2, 3]], [[1, 1, 3, 3], [0, 1, 2, 3]]]


def test_of_candidates_the_chosen_one_is_in_the_text() -> None:
    fetched = {"chosen": np.array([[0], [2], [1]])}
    found = mode(**CANDIDATES)
    assert [each[0].tolist() for each in found.attended_steps(fetched, rows=1, steps=2)] == [[[2]], [[0, 2]]]
    branches = found.branches_of_step(fetched, rows=1, step=0)
    assert branches is not None and branches.tolist() == [[2]]


def test_what_to_record_depends_on_the_mode_and_the_outputs() -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
    for fields, sorting in (({}, ()), (BEAMS, ("parents",)), (CANDIDATES, ("chosen",))):
        assert mode(**fields, **wanted).recorded(("attentions",), False) == ("scores", *sorting)
    assert mode(**BEAMS).recorded(("hidden_states",), False) == ()
    assert mode(**wanted).recorded((), True) == ("scores", "logprobs")
    with pytest.raises(ValueError, match="`output_logprobs` is for greedy decoding and sampling"):
        mode(**BEAMS).recorded((), True)

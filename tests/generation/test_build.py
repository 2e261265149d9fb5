"""A request becomes a call without a program being compiled for it."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.request import Request


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.load(jaxgen.BUNDLED_MODEL)


def built(model: Any, inputs: Any, **keywords: Any) -> PreparedCall:
    request = Request.of(inputs, None, keywords)
    return build_call(model, request, *read_request(model, request))


def test_arguments_and_fields_are_told_apart_by_name() -> None:
    def criterion() -> None: ...

    request = Request.of(
        [[5]], None, {"key": 3, "top_k": 4, "stopping_criteria": (criterion,), "attention_mask": [[1]]}
    )
    assert (request.key, request.stopping_criteria, request.logits_processor) == (3, [criterion], [])
    assert request.keywords == {"top_k": 4, "attention_mask": [[1]]}


def test_a_single_callable_is_no_list_of_them() -> None:
    with pytest.raises(ValueError, match=r"`logits_processor`=.* must be a list of callables\. Wrap a single one"):
        Request.of([[5]], None, {"logits_processor": len})


def test_a_call_is_built_for_shapes_alone_and_compiles_nothing(model: Any) -> None:
    before, calls = jaxgen.compile_counts(), []
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    jax.eval_shape(lambda model: calls.append(built(model, [[5, 6, 7]], max_new_tokens=4)), shapes)
    assert jaxgen.compile_counts() == before
    assert (calls[0].rows, calls[0].prompt_length, calls[0].forward_passes) == (1, 3, 3)


@pytest.mark.parametrize(
    ("keywords", "passes", "slots"),
    [
        ({}, 9, 32),
        ({"num_beams": 3}, 9, 28),  # those of the prompt and the bucket of the new ones apart
        ({"penalty_alpha": 0.5, "top_k": 4}, 10, 32),
    ],
    ids=str,
)
def test_a_call_has_room_for_its_new_tokens(keywords: dict[str, Any], passes: int, slots: int, model: Any) -> None:
    prepared = built(model, [[5, 6, 7]], max_new_tokens=10, **keywords)
    assert (prepared.forward_passes, prepared.call.slots) == (passes, slots)
    np.testing.assert_array_equal(prepared.token_slots, [13, 14, 15])


def test_synced_gpus_must_be_a_bool(model: Any) -> None:
    with pytest.raises(ValueError, match=r"`synced_gpus`='yes' must be True or None"):
        built(model, [[5]], synced_gpus="yes")
    assert built(model, [[5]], max_new_tokens=2, synced_gpus=True).rows == 1

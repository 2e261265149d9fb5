"""Random combinations of fields, continued by transformers and by jaxgen: tokens, scores and logits are equal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import torch_model
from random_calls import PROCESSORS, call, small_model, some

import jaxgen

COMBINATIONS, CALLS_EACH = 20, 13

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = small_model(tmp_path_factory.mktemp("model"))
    return jaxgen.load(folder), torch_model(folder)


def assert_equal_to_transformers(models: tuple[Any, Any], ids: np.ndarray, kwargs: dict[str, Any]) -> None:
    import torch

    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours = jaxgen.generate(models[0], ids, **flags, **kwargs)
    mask = torch.tensor(kwargs.pop("attention_mask"))
    theirs = models[1].generate(torch.tensor(ids), attention_mask=mask, **flags, **kwargs)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences.numpy(), err_msg=str(kwargs))
    for name in ("scores", "logits"):
        expected = np.stack([step.numpy() for step in theirs[name]])
        np.testing.assert_array_equal(np.isneginf(ours[name]), np.isneginf(expected), err_msg=f"{name} {kwargs}")
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-4, err_msg=f"{name} {kwargs}")


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_a_combination_of_processors_gives_the_tokens_scores_and_logits_of_transformers(
    seed: int, models: tuple[Any, Any]
) -> None:
    rng = np.random.default_rng(seed)
    names = some(rng, PROCESSORS, 1, 5)
    for _ in range(CALLS_EACH):
        assert_equal_to_transformers(models, *call(rng, names))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", range(1000, 1500))
def test_five_hundred_more_combinations(seed: int, models: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(seed)
    assert_equal_to_transformers(models, *call(rng, some(rng, PROCESSORS, 1, 5)))

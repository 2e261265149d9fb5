"""Which configuration wins, and that no field of it is ignored without a word."""

import logging
from typing import Any

import numpy as np
import pytest
from architectures import architecture
from transformers import GenerationConfig

import jaxgen
from jaxgen import generation_config as module

PROMPT = [[5, 6, 7]]
FIELDS = sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))
SWITCHED_ON: dict[str, Any] = {
    "num_beams": 2,
    "cache_implementation": "offloaded",
    "assistant_ensemble_weight": 0.5,
    "cache_config": {"nbits": 4},
    "constraints": [object()],
    "force_words_ids": [[5]],
    "stop_strings": ["x"],
    "dola_layers": "high",
    "speculation_type": "dflash",
    "continuous_batching_config": {},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.from_config(architecture(1).config)


def resolve(model_config: Any, config: Any = None, **kwargs: Any) -> module.Resolved:
    return module.resolve(model_config, config, kwargs)[0]


def test_keywords_win_over_the_calls_config_over_the_models_over_the_defaults() -> None:
    models = GenerationConfig(eos_token_id=7, pad_token_id=8, max_length=30, bos_token_id=9)
    calls = GenerationConfig(eos_token_id=17, max_length=40)
    resolved = resolve(models, calls, eos_token_id=27)
    assert (resolved.eos_token_id, resolved.max_length, resolved.pad_token_id) == ((27,), 40, 8)
    assert resolved.return_dict_in_generate is False


def test_none_in_a_config_leaves_a_field_alone_and_none_as_a_keyword_switches_it_off() -> None:
    models = GenerationConfig(eos_token_id=7)
    assert resolve(models, GenerationConfig(eos_token_id=None)).eos_token_id == (7,)
    assert resolve(models, eos_token_id=None).eos_token_id == ()


def test_the_configs_passed_in_are_not_changed() -> None:
    models, calls = GenerationConfig(eos_token_id=7), GenerationConfig(max_length=40)
    before = (models.to_dict(), calls.to_dict())
    resolve(models, calls, pad_token_id=3)
    assert (models.to_dict(), calls.to_dict()) == before


def test_a_config_and_keywords_together_are_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module._warned.clear()
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        resolve(GenerationConfig(), GenerationConfig(max_new_tokens=3), eos_token_id=[5, 6])
    assert "together with generation-related arguments=(['eos_token_id'])" in caplog.text


def test_the_order_of_eos_ids_is_kept() -> None:
    assert resolve(GenerationConfig(), eos_token_id=[9, 3, 5]).eos_token_id == (9, 3, 5)
    assert resolve(GenerationConfig(), eos_token_id=np.array([9, 3])).eos_token_id == (9, 3)


def test_max_new_tokens_wins_over_max_length_and_none_falls_back_to_twenty_new_tokens() -> None:
    assert resolve(GenerationConfig(max_length=50), max_new_tokens=4).length_for(10, 100) == 14
    assert resolve(GenerationConfig(max_length=50)).length_for(10, 100) == 50
    with pytest.warns(UserWarning, match="default `max_length`"):
        assert resolve(GenerationConfig(max_length=50), max_length=None).length_for(10, 100) == 30
    with pytest.warns(UserWarning, match="default `max_length`"):
        assert resolve(GenerationConfig()).length_for(95, 100) == 100


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_installed_transformers_is_accounted_for_once(field: str) -> None:
    groups = [module.SUPPORTED, module.REFUSED, module.NO_EFFECT]
    assert sum(field in group for group in groups) == 1


@pytest.mark.parametrize("field", sorted(module.REFUSED))
def test_a_field_that_is_not_supported_is_refused_by_name_when_switched_on(field: str, model: Any) -> None:
    if field not in FIELDS:
        pytest.fail(f"{field} is no field of the installed GenerationConfig")
    value = SWITCHED_ON.get(field, 3)
    with pytest.raises(ValueError, match=f"`{field}`"):
        jaxgen.generate(model, PROMPT, max_new_tokens=2, **{field: value})


@pytest.mark.parametrize("field", sorted(module.REFUSED))
def test_a_field_that_is_not_supported_may_hold_its_neutral_values(field: str) -> None:
    for value in module.REFUSED[field]:
        resolve(GenerationConfig(), **{field: value})


def test_fields_of_other_modes_change_no_token_as_in_transformers(model: Any) -> None:
    plain = jaxgen.generate(model, PROMPT, max_new_tokens=6)
    others = {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "length_penalty": 2.0, "early_stopping": True}
    np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, max_new_tokens=6, **others), plain)


def test_a_custom_field_of_a_config_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`house_style`='plain' is not a generation field"):
        resolve(GenerationConfig(), GenerationConfig(house_style="plain"))

"""Which configuration wins, and that no field of it is ignored without a word."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import architecture
from oracle import torch_generate, torch_model
from transformers import GenerationConfig

import jaxgen
from jaxgen.generation import user_warnings
from jaxgen.generation.config import resolve as module
from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.modes import mode_for
from jaxgen.generation.modes.beam_search import BeamSearchMode
from jaxgen.generation.modes.contrastive_search import ContrastiveSearchMode
from jaxgen.generation.modes.group_beam_search import GroupBeamSearchMode
from jaxgen.generation.modes.sampling import SamplingMode

PROMPT = [[5, 6, 7]]
FIELDS = sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))
SWITCHED_ON: dict[str, Any] = {
    "num_beams": 2,
    "cache_implementation": "offloaded",
    "constraints": [object()],
    "force_words_ids": [[5]],
    "stop_strings": ["x"],
    "dola_layers": "high",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.from_config(architecture(1).config)


def resolve(model_config: Any, config: Any = None, **kwargs: Any) -> DecodeConfig:
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
    user_warnings._warned.clear()
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


# Fields of other models and modes in a generation_config.json, and how many words are said.
UNHEEDED: list[tuple[dict[str, Any], int]] = [
    ({"chat_format": "chatml", "max_window_size": 6144, "stop_words_ids": [[3]]}, 1),
    ({"return_timestamps": True, "lang_to_id": {"<|en|>": 5}, "forced_decoder_ids": [[1, 7]]}, 1),
    ({"house_style": None}, 0),
    ({"num_beam_groups": 2, "diversity_penalty": 0.5}, 2),
    ({"diversity_penalty": 0.5}, 1),
    ({"num_beam_groups": 0, "do_sample": 0, "early_stopping": 0, "output_scores": 0, "penalty_alpha": 0.0}, 0),
    ({"penalty_alpha": 0.6, "top_k": 1}, 1),
    ({"cache_implementation": "hybrid"}, 0),
    ({"cache_implementation": "hybrid_chunked"}, 0),
    ({"cache_implementation": "sliding_window"}, 0),
    ({"cache_implementation": "paged"}, 1),
    ({"max_cache_len": 3, "cache_config": {"nbits": 4}}, 0),
    ({"low_memory": True, "speculation_type": "dflash", "assistant_ensemble_weight": 0.5}, 0),
    ({"num_assistant_tokens": 3, "is_assistant": False, "assistant_confidence_threshold": 0.9}, 0),
    ({"decoder_start_token_id": 5, "encoder_no_repeat_ngram_size": 0, "min_new_tokens": 0, "guidance_scale": 1}, 0),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("fields", "words"), UNHEEDED, ids=str)
def test_fields_that_transformers_runs_without_heeding_change_no_token(
    fields: dict[str, Any], words: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_warnings._warned.clear()
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "pad_token_id": 0, **fields}))
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        ours = jaxgen.load(copy)
        tokens = [jaxgen.generate(ours, PROMPT, max_new_tokens=6) for _ in range(2)][1]
    np.testing.assert_array_equal(tokens, torch_generate(torch_model(copy), PROMPT, max_new_tokens=6))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("jaxgen")]
    assert len(said) == words
    assert all(any(name in each for name in fields) for each in said)


def mode(model_config: Any, **kwargs: Any) -> type:
    return type(mode_for(resolve(model_config, **kwargs)))


def test_contrastive_search_of_the_models_config_gives_way_to_sampling_and_beams(caplog: Any) -> None:
    models = GenerationConfig(penalty_alpha=0.6, top_k=4)
    assert mode(models) is ContrastiveSearchMode
    for given in ({"do_sample": True}, {"num_beams": 2}, {"top_k": 1}):
        assert mode(models, **given) is (BeamSearchMode if "num_beams" in given else SamplingMode)
        with pytest.raises(ValueError, match="`penalty_alpha`"):
            mode(GenerationConfig(), **{"penalty_alpha": 0.6, "top_k": 4, **given})


def test_groups_of_the_models_config_divide_beams_and_nothing_else() -> None:
    models = GenerationConfig(num_beam_groups=2, diversity_penalty=0.5)
    assert mode(models) is SamplingMode
    assert mode(models, num_beams=4) is GroupBeamSearchMode
    with pytest.raises(ValueError, match="`num_beams`=1 must be a multiple of `num_beam_groups`=2"):
        mode(GenerationConfig(), num_beam_groups=2, diversity_penalty=0.5)


def test_names_that_are_no_fields_are_said_once_and_read_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    user_warnings._warned.clear()
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        for _ in range(2):
            resolve(GenerationConfig(), GenerationConfig(house_style="plain", other=3))
    assert caplog.text.count("['house_style', 'other'], which are not fields of transformers' GenerationConfig") == 1

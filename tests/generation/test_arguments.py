"""The table of fields is whole, docs/arguments.md is made from it, and a test shows each field and argument."""

import inspect
from pathlib import Path

import arguments
import pytest
from transformers import GenerationConfig

import jaxgen
from jaxgen.generation.config.fields import FIELDS, SUPPORTED, GenerateKeywords, described

TESTS = Path(__file__).parents[1]
PARAMETERS = set(inspect.signature(jaxgen.generate).parameters) - {"model", "kwargs"}
KEYWORDS = described(GenerateKeywords)

_DIFFERENTIAL = (
    "test_differential.py::test_a_combination_of_processors_gives_the_tokens_scores_and_logits_of_transformers"
)
_NOISE = "decoding/test_sampling.py::test_with_the_same_noise_every_token_equals_transformers"
_SAME = "generation/test_api.py::test_tokens_and_width_equal_transformers_with"
_OUTPUTS = "generation/test_outputs.py::test_every_number_equals_transformers"
SHOWN_BY = {
    "max_length": _SAME,
    "max_new_tokens": _SAME,
    "eos_token_id": _SAME,
    "pad_token_id": _SAME,
    "bos_token_id": "generation/test_api.py::test_without_a_prompt_each_row_starts_from_bos",
    "prompt_lookup_num_tokens": "decoding/test_assisted.py::test_right_drafts_save_steps_and_wrong_ones_cost_none",
    "max_matching_ngram_size": "decoding/test_drafters.py::test_the_last_place_with_the_longest_match_is_continued",
    "assistant_model": "decoding/test_assistant.py::"
    "test_whatever_the_assistant_tokens_and_logprobs_are_those_of_the_plain_call",
    "assistant_tokenizer": "generation/test_translation.py::"
    "test_a_model_with_other_ids_for_the_same_tokens_drafts_what_the_model_says",
    "num_assistant_tokens": "decoding/test_assistant.py::test_settings_come_from_the_call_and_then_from_the_assistant",
    "num_assistant_tokens_schedule": "decoding/test_assistant.py::"
    "test_a_schedule_drafts_more_after_a_draft_that_stayed_and_less_after_another",
    "assistant_confidence_threshold": "decoding/test_assistant.py::test_an_unsure_token_ends_a_draft",
    "assistant_early_exit": "decoding/test_assistant.py::test_early_exit_drafts_with_the_first_layers",
    "do_sample": _NOISE,
    "num_return_sequences": _NOISE,
    **dict.fromkeys(
        "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split(),
        _NOISE,
    ),
    **dict.fromkeys(
        "min_length min_new_tokens repetition_penalty encoder_repetition_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids sequence_bias renormalize_logits forced_bos_token_id "
        "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
        "begin_suppress_tokens guidance_scale".split(),
        _DIFFERENTIAL,
    ),
    "decoder_start_token_id": "generation/test_encoder_decoder.py::test_every_row_may_have_a_start_token_of_its_own",
    "decoder_input_ids": "generation/test_encoder_decoder.py::"
    "test_the_start_token_is_put_before_the_decoders_tokens_unless_a_row_begins_with_it",
    "decoder_attention_mask": "generation/test_encoder_decoder.py::"
    "test_masked_columns_before_a_t5s_text_change_nothing",
    "encoder_outputs": "generation/test_encoder_decoder.py::"
    "test_the_encoders_output_takes_the_place_of_its_input_and_is_never_changed",
    "watermarking_config": "generation/test_api.py::test_watermarked_tokens_equal_transformers",
    **dict.fromkeys(
        "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate".split(), _OUTPUTS
    ),
    **dict.fromkeys(
        "num_beams early_stopping length_penalty".split(),
        "decoding/test_beam_search.py::test_sequences_scores_and_indices_equal_transformers",
    ),
    **dict.fromkeys(
        "num_beam_groups diversity_penalty".split(),
        "decoding/test_group_beam_search.py::test_sequences_and_scores_are_those_of_transformers_4_41",
    ),
    "streamer": "generation/running/test_streaming.py::"
    "test_streamed_tokens_are_those_of_the_plain_call_from_the_same_programs",
    "max_time": "generation/running/test_streaming.py::"
    "test_a_limit_of_time_is_kept_to_a_chunk_and_compiling_takes_none_of_it",
    **dict.fromkeys(
        ["stop_strings", "tokenizer"], "processors/test_stop_strings.py::test_generated_texts_stop_as_in_transformers"
    ),
    "cache": "generation/test_continuing.py::test_other_turns_on_a_cache_equal_transformers",
    "past_key_values": "generation/test_continuing.py::test_the_cache_goes_in_and_comes_out_under_both_names",
    "logits_to_keep": "generation/test_api.py::test_logits_to_keep_changes_no_token_as_in_transformers",
    "custom_generate": "generation/test_custom_generate.py::test_what_a_function_gets_is_what_transformers_gives_it",
    "trust_remote_code": "generation/test_custom_generate.py::"
    "test_a_folder_without_permission_is_refused_in_transformers_words",
    "inputs_embeds": "generation/test_continuing.py::test_embeddings_in_place_of_tokens_equal_transformers",
    "position_ids": "generation/test_continuing.py::test_positions_of_the_callers_own_equal_transformers",
    "prefill_chunk_size": "generation/test_continuing.py::test_a_prompt_read_in_chunks_gives_the_same_tokens",
    "use_cache": "generation/test_outputs.py::test_use_cache_false_changes_no_token_and_returns_no_cache",
    **dict.fromkeys(
        ["cache_implementation", "cache_config"],
        "generation/test_quantized_cache.py::test_tokens_with_a_cache_in_fp8_equal_transformers",
    ),
    "token_healing": "generation/prompt/test_token_healing.py::test_healed_prompts_and_what_follows_equal_transformers",
    "penalty_alpha": "decoding/test_contrastive_search.py::test_sequences_are_those_of_transformers_4_41",
    "inputs": "generation/test_api.py::test_prompts_come_as_lists_or_arrays_of_any_integer_type_under_either_name",
    "input_ids": "generation/test_api.py::test_prompts_come_as_lists_or_arrays_of_any_integer_type_under_either_name",
    "attention_mask": _SAME,
    "generation_config": "generation/config/test_resolve.py::"
    "test_keywords_win_over_the_calls_config_over_the_models_over_the_defaults",
    "logits_processor": "generation/test_custom.py::test_transformers_own_processors_run_as_they_are",
    "stopping_criteria": "generation/test_custom.py::test_criteria_of_any_kind_finish_rows_as_in_transformers",
    "prefix_allowed_tokens_fn": "generation/test_custom.py::test_allowed_tokens_by_prefix_equal_transformers",
    "negative_prompt_ids": "generation/test_api.py::test_negative_prompts_equal_transformers",
    "negative_prompt_attention_mask": "generation/test_api.py::test_negative_prompts_equal_transformers",
    "synced_gpus": "test_many_processes.py::"
    "test_every_process_gets_the_tokens_that_it_would_get_alone",
    "key": "decoding/test_sampling.py::test_a_key_may_be_an_int_a_typed_key_or_an_old_one",
    "output_logprobs": "generation/test_outputs.py::"
    "test_logprobs_are_those_of_the_chosen_tokens_without_the_vocabulary",
}


@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_the_test_that_shows_it_exists(name: str) -> None:
    file, function = name.split("::")
    assert f"def {function}(" in (TESTS / file).read_text()


def test_every_supported_field_and_argument_is_shown_by_a_test() -> None:
    inputs = KEYWORDS.keys() - FIELDS.keys()
    assert SHOWN_BY.keys() == SUPPORTED | PARAMETERS | inputs


def test_the_page_of_arguments_is_the_one_that_the_code_makes() -> None:
    assert arguments.FILE.read_text() == arguments.page(), "run `python tests/scripts/arguments.py`"


def test_the_docstring_explains_every_argument() -> None:
    assert arguments.documented().keys() == PARAMETERS | {"model"}


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    ours = {name: FIELDS[name][1].default for name in SUPPORTED}
    assert ours == {name: theirs.get(name) for name in SUPPORTED}


def test_every_field_of_the_installed_transformers_is_in_the_table() -> None:
    assert {name for name in GenerationConfig().to_dict() if not name.startswith("_")} <= FIELDS.keys()


@pytest.mark.oracle
def test_every_parameter_of_transformers_is_on_the_page() -> None:
    from transformers import GenerationMixin

    page = arguments.page()
    for name in inspect.signature(GenerationMixin.generate).parameters:
        assert name in ("self", "kwargs") or f"| `{name}` |" in page, name

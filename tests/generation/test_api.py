"""`generate` at its door: what it accepts, refuses, warns about and returns, beside transformers if torch is there."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import architecture
from oracle import torch_generate, torch_model
from transformers import GenerationConfig

import jaxgen
from jaxgen import lazy
from jaxgen.buckets import bucket

PROMPT = [[5, 6, 7]]
BATCH = [[5, 6, 7], [8, 9, 10]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architecture(1).write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return jaxgen.load(folder)


@pytest.fixture(scope="module")
def twin(folder: Path) -> Any:
    return torch_model(folder)


def continuation(model: Any, prompt: Any = PROMPT, **kwargs: Any) -> list[list[int]]:
    kwargs = {"max_new_tokens": 8, "eos_token_id": None, **kwargs}
    return jaxgen.generate(model, prompt, **kwargs)[:, np.shape(prompt)[1] :].tolist()


# ---- Same tokens as transformers ----

INTERIOR_PADDING = [[0, 0, 5, 6], [7, 0, 8, 9], [5, 6, 0, 0]]
SAME_AS_TRANSFORMERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a prompt of one token": ([[5]], {}),
    "no eos": (BATCH, {"eos_token_id": None}),
    "every token is an eos": (BATCH, {"eos_token_id": list(range(97))}),
    "several eos ids and a pad": (BATCH, {"eos_token_id": list(range(3, 60)), "pad_token_id": 0}),
    "pad defaults to the first eos": (BATCH, {"eos_token_id": list(range(3, 60)), "pad_token_id": None}),
    "pad is an eos": (BATCH, {"eos_token_id": list(range(3, 60)), "pad_token_id": 3}),
    "max_length counts the prompt": (BATCH, {"max_new_tokens": None, "max_length": 9}),
    "one new token": (BATCH, {"max_new_tokens": 1}),
    "the mask is inferred from pads on the left, inside and on the right": (INTERIOR_PADDING, {"pad_token_id": 0}),
    "no mask is inferred when pad is eos": (INTERIOR_PADDING, {"pad_token_id": 0, "eos_token_id": 0}),
    "no mask is inferred without a pad": (INTERIOR_PADDING, {"pad_token_id": None, "eos_token_id": None}),
    "a mask is inferred without an eos": (INTERIOR_PADDING, {"pad_token_id": 0, "eos_token_id": None}),
    "a right-padded row restarts its positions": (
        [[26, 61, 41, 33, 0, 0], [5, 6, 7, 8, 9, 10]],
        {"attention_mask": [[1, 1, 1, 1, 0, 0], [1] * 6]},
    ),
    "a row that is masked altogether": (BATCH, {"attention_mask": [[0, 0, 0], [1, 1, 1]]}),
    "a mask that contradicts the pads": (INTERIOR_PADDING, {"attention_mask": [[1] * 4] * 3, "pad_token_id": 0}),
    "a boolean mask": (BATCH, {"attention_mask": [[False, True, True], [True] * 3]}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", SAME_AS_TRANSFORMERS)
def test_tokens_and_width_equal_transformers_with(case: str, model: Any, twin: Any) -> None:
    prompt, kwargs = SAME_AS_TRANSFORMERS[case]
    kwargs = {"max_new_tokens": 8, **kwargs}
    np.testing.assert_array_equal(jaxgen.generate(model, prompt, **kwargs), torch_generate(twin, prompt, **kwargs))


@pytest.mark.oracle
def test_without_a_prompt_each_row_starts_from_bos(model: Any, twin: Any) -> None:
    import torch

    np.testing.assert_array_equal(jaxgen.generate(model, max_new_tokens=5), twin.generate(max_new_tokens=5).numpy())
    mask = np.ones((3, 1), int)
    np.testing.assert_array_equal(
        jaxgen.generate(model, attention_mask=mask, max_new_tokens=5),
        twin.generate(attention_mask=torch.tensor(mask), max_new_tokens=5).numpy(),
    )


@pytest.mark.oracle
def test_the_default_length_is_twenty_new_tokens_within_the_models_context(model: Any, twin: Any) -> None:
    for columns in (3, 120):
        prompt = np.arange(columns)[None] % 90 + 3
        with pytest.warns(UserWarning, match=f"max_length` \\(={min(columns + 20, 128)}\\)"):
            ours = jaxgen.generate(model, prompt, eos_token_id=None)
        np.testing.assert_array_equal(ours, torch_generate(twin, prompt, eos_token_id=None))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "negative",
    [
        {},
        {"negative_prompt_ids": [[5, 9, 4, 8, 20], [30, 31, 32, 33, 34]]},
        {
            "negative_prompt_ids": [[0, 0, 4, 8, 20], [30, 31, 0, 0, 0]],
            "negative_prompt_attention_mask": [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]],
        },
    ],
    ids=["the last token of the prompt", "longer than the prompt", "padded on either side"],
)
def test_negative_prompts_equal_transformers(negative: dict[str, Any], model: Any, twin: Any) -> None:
    import torch

    kwargs = {"max_new_tokens": 12, "eos_token_id": None, "guidance_scale": 1.7}
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    theirs = torch_generate(
        twin, BATCH, attention_mask=mask, **kwargs, **{name: torch.tensor(value) for name, value in negative.items()}
    )
    np.testing.assert_array_equal(jaxgen.generate(model, BATCH, attention_mask=mask, **kwargs, **negative), theirs)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        {"bias": 5.0},
        {"bias": 5.0, "seeding_scheme": "selfhash", "context_width": 2},
        {"ngram_len": 3, "keys": [11, 7, 5, 3]},
    ],
    ids=["lefthash", "selfhash", "SynthID"],
)
def test_watermarked_tokens_equal_transformers(config: dict[str, Any], model: Any, twin: Any) -> None:
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    watermark = (SynthIDTextWatermarkingConfig if "keys" in config else WatermarkingConfig)(**config)
    kwargs = {"max_new_tokens": 12, "eos_token_id": None, "watermarking_config": watermark}
    output = jaxgen.generate(model, BATCH, **kwargs)
    np.testing.assert_array_equal(output, torch_generate(twin, BATCH, **kwargs))
    assert (output != jaxgen.generate(model, BATCH, max_new_tokens=12, eos_token_id=None)).any()


# ---- Rows do not know each other ----


@pytest.mark.parametrize("padding", [0, 3, 14, *(pytest.param(each, marks=pytest.mark.sweep) for each in (1, 13, 40))])
def test_left_padding_of_any_width_changes_no_token(model: Any, padding: int) -> None:
    padded = [[0] * padding + PROMPT[0]]
    assert continuation(model, padded, attention_mask=[[0] * padding + [1] * 3]) == continuation(model)


@pytest.mark.parametrize("rows", [2, 3, 5, 9])
def test_batch_mates_change_no_token(model: Any, rows: int) -> None:
    rng = np.random.default_rng(rows)
    batch = rng.integers(3, 97, (rows, 7))
    mask = np.ones_like(batch)
    batch[rows // 2], mask[rows // 2] = [0, 0, 0, 0, *PROMPT[0]], [0, 0, 0, 0, 1, 1, 1]
    assert continuation(model, batch, attention_mask=mask)[rows // 2] == continuation(model)[0]


def test_more_slots_change_no_token(model: Any) -> None:
    assert continuation(model, max_new_tokens=100)[0][:8] == continuation(model)[0]


def test_a_pad_id_inside_a_prompt_is_an_ordinary_token_if_the_mask_says_so(model: Any) -> None:
    plain = continuation(model, [[5, 0, 7]], attention_mask=[[1, 1, 1]], pad_token_id=0)
    assert plain == continuation(model, [[5, 0, 7]], pad_token_id=None)
    assert plain != continuation(model, [[5, 0, 7]], pad_token_id=0)


# ---- Forms of input and output ----


def test_prompts_come_as_lists_or_arrays_of_any_integer_type_under_either_name(model: Any) -> None:
    expected = continuation(model)
    for prompt in (PROMPT, np.array(PROMPT, np.int64), np.array(PROMPT, np.uint8), jnp.array(PROMPT)):
        assert continuation(model, prompt) == expected
    assert jaxgen.generate(model, input_ids=PROMPT, max_new_tokens=8, eos_token_id=None)[:, 3:].tolist() == expected


def test_the_output_is_int32_with_the_prompt_in_front(model: Any) -> None:
    output = jaxgen.generate(model, BATCH, max_new_tokens=2, eos_token_id=None)
    assert output.dtype == np.int32 and output.shape == (2, 5)
    assert output[:, :3].tolist() == BATCH


@pytest.mark.parametrize("integer", [np.int64, np.array, jnp.int32])
def test_lengths_and_ids_may_be_integers_of_any_library(model: Any, integer: Any) -> None:
    expected = continuation(model)[0]
    assert continuation(model, max_new_tokens=integer(8))[0] == expected
    for stop in (integer(expected[3]), [integer(expected[3]), 2**40]):
        assert continuation(model, eos_token_id=stop)[0] == expected[: expected.index(expected[3]) + 1]


def test_the_output_is_the_callers_own(model: Any) -> None:
    output = jaxgen.generate(model, PROMPT, max_new_tokens=2)
    output[0, 0] = 1
    assert output.base is None


def test_inside_a_transformation_the_error_points_to_decode(model: Any) -> None:
    with pytest.raises(ValueError, match=r"Use `jaxgen\.decode`"):
        jax.jit(lambda ids: jaxgen.generate(model, ids, max_new_tokens=3))(jnp.array(PROMPT))
    with pytest.raises(ValueError, match=r"`prepare` run on the host.*with a call that `prepare` returned outside"):
        jax.jit(lambda ids: jaxgen.prepare(model, ids, max_new_tokens=3))(jnp.array(PROMPT))
    with pytest.raises(ValueError, match=r"Use `jaxgen\.decode`"):
        jax.jit(lambda model: jaxgen.generate(model, PROMPT, max_new_tokens=3))(model)
    with pytest.raises(ValueError, match=r"Use `jaxgen\.decode`"):
        jax.jit(lambda: jaxgen.generate(model, PROMPT, max_new_tokens=3))()


def test_a_model_says_where_generate_is(model: Any) -> None:
    with pytest.raises(AttributeError, match=r"Call `jaxgen\.generate\(model, input_ids, \.\.\.\)`"):
        model.generate(PROMPT)


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2, "eos_token_id": None}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kept", [0, 1, 3, 100])
def test_logits_to_keep_changes_no_token_as_in_transformers(kept: int, arguments: Any, model: Any, twin: Any) -> None:
    arguments = {"max_new_tokens": 4, "logits_to_keep": kept, "pad_token_id": 0, **arguments}
    expected = torch_generate(twin, PROMPT, **arguments)
    np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, **arguments), expected)


def test_the_models_generation_config_can_be_replaced(folder: Path) -> None:
    model = jaxgen.load(folder)
    model.generation_config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    assert jaxgen.generate(model, PROMPT).shape == (1, 8)


def test_double_precision_mode_changes_no_token(model: Any) -> None:
    expected = continuation(model)
    with jax.enable_x64(True):
        assert continuation(model) == expected


def test_return_dict_gives_the_same_sequences_by_attribute_and_by_key(model: Any) -> None:
    output = jaxgen.generate(model, PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    np.testing.assert_array_equal(output.sequences, jaxgen.generate(model, PROMPT, max_new_tokens=4))
    assert output["sequences"] is output[0] is output.sequences
    assert list(output) == output.keys() == ["sequences", lazy.cache_name()]


# ---- Errors, from the host, naming argument, value and remedy ----

SAMPLED = {"do_sample": True, "key": 0}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an id beyond the vocabulary": ([[5, 97]], {}, r"`input_ids` holds 97, but ids of this model are 0 to 96"),
    "a negative id": ([[-1, 5]], {}, r"`input_ids` holds -1"),
    "an empty prompt": (np.zeros((1, 0), int), {}, r"shape \(1, 0\).*at least one token"),
    "an empty batch": (np.zeros((0, 3), int), {}, r"shape \(0, 3\)"),
    "one dimension": ([5, 6], {}, r"shape \(2,\).*\[prompts, tokens\]"),
    "three dimensions": ([[[5]]], {}, r"\[prompts, tokens\]"),
    "ragged lists": ([[5, 6], [7]], {}, r"rectangular.*Pad the rows"),
    "a text": ("Once upon", {}, r"`input_ids` is text \('Once upon'\).*tokenizer\(texts, padding=True"),
    "texts": (["Once", "upon a time"], {}, r"`input_ids` is text \('Once'\)"),
    "negative texts": (
        PROMPT,
        {"negative_prompt_ids": [["a"]], "guidance_scale": 2.0},
        "`negative_prompt_ids` is text",
    ),
    "transformers' Flax name of the key": (PROMPT, {"prng_key": 0}, "`prng_key` is not an argument.*Pass `key=`"),
    "a seed": (PROMPT, {"seed": 0}, "`seed` is not an argument.*Pass `key=`"),
    "a torch generator": (PROMPT, {"generator": object()}, "`generator` is not an argument.*Pass `key=`"),
    "a negative logits_to_keep": (PROMPT, {"logits_to_keep": -1}, "`logits_to_keep`=-1 must be a number of tokens"),
    "columns to keep by number": (PROMPT, {"logits_to_keep": np.array([2])}, "`logits_to_keep`=array"),
    "floats": ([[0.5]], {}, r"dtype float64.*Tokenise"),
    "both names of the prompt": (PROMPT, {"input_ids": PROMPT}, "`inputs` and `input_ids`"),
    "no prompt and no bos": (None, {"bos_token_id": None}, "`bos_token_id` has to be defined when no `input_ids`"),
    "a mask of another shape": (PROMPT, {"attention_mask": [[1, 1]]}, r"`attention_mask` has shape \(1, 2\).*\(1, 3\)"),
    "a mask of three dimensions": (PROMPT, {"attention_mask": [[[1, 1, 1]]]}, "must be 2D"),
    "a mask of other numbers": (PROMPT, {"attention_mask": [[1, 2, 1]]}, "holds 2, but must hold 0 and 1"),
    "max_new_tokens=0": (PROMPT, {"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0"),
    "max_new_tokens=-1": (PROMPT, {"max_new_tokens": -1}, "must be greater than 0, but is -1"),
    "a length beyond 32 bits": (PROMPT, {"max_new_tokens": 10**30}, "requested length is.*Lower `max_new_tokens`"),
    "a length of True": (PROMPT, {"max_new_tokens": True}, "`max_new_tokens`=True must be an integer"),
    "a fractional length": (PROMPT, {"max_new_tokens": 2.5}, "`max_new_tokens`=2.5 must be an integer"),
    "max_length within the prompt": (
        PROMPT,
        {"max_length": 3, "max_new_tokens": None},
        "Input length of input_ids is 3, but `max_length` is set to 3",
    ),
    "more memory than there is": (
        PROMPT,
        {"max_new_tokens": 10**9},
        r"need .* GB for the cache.*Lower `max_new_tokens`",
    ),
    "a typo": (PROMPT, {"max_new_token": 3}, "not used by the model: .'max_new_token'.*Did you mean `max_new_tokens`"),
    "an unknown keyword": (PROMPT, {"foo": 1}, "not used by the model: .'foo'"),
    "a config of another class": (
        PROMPT,
        {"generation_config": {"max_length": 5}},
        "must be a transformers.Generation",
    ),
    "eos as text": (PROMPT, {"eos_token_id": "</s>"}, "`eos_token_id`='</s>' must be a token id"),
    "greedy with several sequences": (PROMPT, {"num_return_sequences": 2}, "do not support `num_return_sequences`"),
    "a mapping": ({"input_ids": PROMPT}, {}, r"mapping of .'input_ids'.. Pass its parts.*\*\*inputs"),
    "a pad beyond 32 bits": (PROMPT, {"pad_token_id": 2**31}, "`pad_token_id`=2147483648 must be one token id"),
    "an eos of True": (PROMPT, {"eos_token_id": [True]}, "`eos_token_id`=.True. must be a token id"),
    "sampling as a number": (PROMPT, {"do_sample": 1}, "`do_sample`=1 must be True or False"),
    "sampling as text": (PROMPT, {"do_sample": "yes"}, "`do_sample`='yes' must be True or False"),
    "top_k as True": (PROMPT, {**SAMPLED, "top_k": True}, "`top_k` has to be a strictly positive integer.*True"),
    "top_p as text": (PROMPT, {**SAMPLED, "top_p": "0.9"}, "`top_p` has to be a number, but is '0.9'"),
    "top_p as NaN": (PROMPT, {**SAMPLED, "top_p": math.nan}, "`top_p` has to be a number, but is nan"),
    "eta_cutoff as text": (PROMPT, {**SAMPLED, "eta_cutoff": "0.1"}, "`eta_cutoff` has to be a number, but is '0.1'"),
    "a bad word of True": (PROMPT, {"bad_words_ids": [[True]]}, "`bad_words_ids` holds True, but ids"),
    "a forced eos of nothing": (PROMPT, {"forced_eos_token_id": []}, "`forced_eos_token_id`=.. is empty"),
    "a decay as text": (
        PROMPT,
        {"exponential_decay_length_penalty": (1, "1.5"), "eos_token_id": 4},
        "`exponential_decay_length_penalty` must be .start, factor.",
    ),
    "temperature 0": (PROMPT, {**SAMPLED, "temperature": 0.0}, "strictly positive float.*set `do_sample=False`"),
    "temperature as an int": (PROMPT, {**SAMPLED, "temperature": 2}, r"`temperature` \(=2\) has to be a strictly"),
    "top_k below 0": (PROMPT, {**SAMPLED, "top_k": -1}, "`top_k` has to be a strictly positive integer.*-1"),
    "a fractional top_k": (PROMPT, {**SAMPLED, "top_k": 2.0}, "`top_k` has to be a strictly positive integer.*2.0"),
    "top_p below 0": (PROMPT, {**SAMPLED, "top_p": -0.1}, "`top_p` has to be a float from 0 to 1, but is -0.1"),
    "min_p above 1": (PROMPT, {**SAMPLED, "min_p": 1.5}, r"`min_p`.*\[0, 1\].*1.5"),
    "typical_p 0": (PROMPT, {**SAMPLED, "typical_p": 0.0}, "`typical_p` has to be a float > 0 and < 1, but is 0.0"),
    "top_h 0": (PROMPT, {**SAMPLED, "top_h": 0.0}, r"`top_h` must be in the range \(0, 1\], but is 0.0"),
    "top_h above 1": (PROMPT, {**SAMPLED, "top_h": 1.5}, r"`top_h` must be in the range \(0, 1\], but is 1.5"),
    "a penalty as an int": (PROMPT, {"repetition_penalty": 2}, "`repetition_penalty` has to be a strictly positive"),
    "a penalty of 0": (PROMPT, {"encoder_repetition_penalty": 0.0}, "`encoder_repetition_penalty`.*positive float"),
    "a fractional n-gram": (PROMPT, {"no_repeat_ngram_size": 1.5}, "`no_repeat_ngram_size`.*integer, but is 1.5"),
    "no bad words": (PROMPT, {"bad_words_ids": []}, "`bad_words_ids` has to be a non-empty list of lists"),
    "a flat list of bad words": (PROMPT, {"bad_words_ids": [5]}, "`bad_words_ids` has to be a non-empty list of lists"),
    "a bad word beyond the vocabulary": (PROMPT, {"bad_words_ids": [[5, 97]]}, "`bad_words_ids` holds 97, but ids"),
    "a negative bad word": (PROMPT, {"bad_words_ids": [[-1]]}, "`bad_words_ids` holds -1, but ids"),
    "an empty bias": (PROMPT, {"sequence_bias": {}}, "`sequence_bias` has to be a non-empty"),
    "a bias as an int": (PROMPT, {"sequence_bias": {(5,): 2}}, r"`sequence_bias` has the bias 2 for \(5,\)"),
    "a bias on an id": (PROMPT, {"sequence_bias": {5: 2.0}}, "`sequence_bias` holds .5, 2.0., which is not a sequence"),
    "a bias beyond the vocabulary": (PROMPT, {"sequence_bias": [[[97], 1.0]]}, "`sequence_bias` holds 97, but ids"),
    "a forced eos beyond": (PROMPT, {"forced_eos_token_id": 97}, "`forced_eos_token_id` holds 97, but ids of this"),
    "decay without an eos": (
        PROMPT,
        {"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": None},
        r"`exponential_decay_length_penalty` raises the score of `eos_token_id`, but that is \[\]",
    ),
    "forcing what is suppressed": (
        PROMPT,
        {"suppress_tokens": [5], "forced_eos_token_id": 5},
        "Every token in `forced_eos_token_id`",
    ),
    "no sequences": (PROMPT, {**SAMPLED, "num_return_sequences": 0}, "`num_return_sequences`=0 must be at least 1"),
    "negative prompts of another batch": (
        PROMPT,
        {"guidance_scale": 2.0, "negative_prompt_ids": [[5], [6]]},
        "`negative_prompt_ids` has 2 rows, but there are 1 prompts",
    ),
    "a negative prompt beyond the vocabulary": (
        PROMPT,
        {"guidance_scale": 2.0, "negative_prompt_ids": [[97]]},
        "`negative_prompt_ids` holds 97",
    ),
    "a green list of everything": (
        PROMPT,
        {"watermarking_config": {"greenlist_ratio": 1.0}},
        "greenlist_ratio must lie strictly between 0 and 1",
    ),
    "an assistant": (PROMPT, {"assistant_model": object()}, "must be a jaxgen model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_before_anything_is_compiled(case: str, model: Any) -> None:
    prompt, kwargs, message = REFUSED[case]
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, prompt, **{"max_new_tokens": 3, **kwargs})
    assert jaxgen.compile_counts() == before


def test_an_unknown_keyword_of_none_is_ignored_as_in_transformers(model: Any) -> None:
    assert continuation(model, foo=None, streamer=None) == continuation(model)


def test_neutral_values_of_arguments_to_come_are_accepted(model: Any) -> None:
    neutral = {"trust_remote_code": False, "synced_gpus": False, "position_ids": None, "past_key_values": None}
    assert continuation(model, **neutral) == continuation(model)


def test_bad_words_that_are_all_eos_forbid_nothing_as_in_transformers(model: Any) -> None:
    assert continuation(model, bad_words_ids=[[5]], eos_token_id=5) == continuation(model, eos_token_id=5)


# ---- Warnings ----

WARNED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "right padding by the mask": (BATCH, {"attention_mask": [[1, 1, 0], [1, 1, 1]]}, "right-padding was detected"),
    "right padding by the last token": ([[5, 0], [6, 7]], {"pad_token_id": 0}, "right-padding was detected"),
    "a batch with neither mask nor pad": (
        BATCH,
        {"pad_token_id": None, "eos_token_id": 2},
        "pad token id were not set",
    ),
    "a batch whose pad is eos": (BATCH, {"pad_token_id": 2, "eos_token_id": 2}, "pad token is same as eos token"),
    "a negative eos": (PROMPT, {"eos_token_id": -1}, "`eos_token_id` should consist of positive integers"),
    "two lengths": (PROMPT, {"max_length": 5}, "`max_new_tokens` will take precedence"),
    "beyond the context": (PROMPT, {"max_new_tokens": 130}, "max_position_embeddings"),
    "an eos beyond the vocabulary": (PROMPT, {"eos_token_id": 97}, "`eos_token_id` holds 97, but ids of this model"),
    "a minimum beyond the maximum": (PROMPT, {"min_new_tokens": 5, "min_length": 2}, "`min_new_tokens` will take prec"),
    "a key without sampling": (PROMPT, {"key": 0}, "`key` has no effect without `do_sample=True`"),
    "a negative prompt without guidance": (
        PROMPT,
        {"negative_prompt_ids": [[5]]},
        "no effect without `guidance_scale`",
    ),
    "a masked row": (BATCH, {"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "masks all of row 1"),
}


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("case", WARNED)
def test_is_warned_about_and_goes_on(case: str, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompt, kwargs, message = WARNED[case]
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        output = jaxgen.generate(model, prompt, **{"max_new_tokens": 3, **kwargs})
    assert message in caplog.text
    assert output.shape[1] > np.shape(prompt)[1]


def test_nan_weights_are_reported_with_the_rows_they_spoiled(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = jaxgen.load(folder)
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...].at[50].set(np.nan)
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        jaxgen.generate(model, [[5, 6], [50, 6]], attention_mask=np.ones((2, 2)), max_new_tokens=3, eos_token_id=None)
    assert "Rows [1] produced NaN or infinite scores" in caplog.text


def test_an_ordinary_call_says_nothing(model: Any, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxgen.generate(model, BATCH, attention_mask=np.ones((2, 3)), max_new_tokens=3)
    assert caplog.text == "" and capfd.readouterr() == ("", "")


# ---- Buckets and compiles ----


def test_a_bucket_is_at_most_half_as_much_again() -> None:
    for size in range(1, 3000):
        assert size <= bucket(size) < max(size * 1.5, size + 1)
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_calls_within_a_bucket_compile_one_prefill_and_one_decode(tmp_path: Path) -> None:
    model = jaxgen.load(architecture(3).write(tmp_path))
    rng = np.random.default_rng(0)
    before = jaxgen.compile_counts()
    for _ in range(30):
        columns = int(rng.integers(17, 25))
        jaxgen.generate(
            model,
            rng.integers(3, 97, (int(rng.integers(5, 7)), columns)),
            max_new_tokens=int(rng.integers(9, 25)),
            eos_token_id=rng.integers(3, 97, int(rng.integers(1, 8))).tolist(),
            pad_token_id=int(rng.integers(0, 97)),
        )
    after = jaxgen.compile_counts()
    assert {name: after[name] - before[name] for name in after} == {"prefill": 1, "advance": 1, "grow": 0}


NUMBERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "greedy": (
        {},
        [{"eos_token_id": 5, "pad_token_id": 1}, {"eos_token_id": [5, 6, 7], "max_new_tokens": 12}, {"max_length": 20}],
    ),
    "sampling": (
        {"do_sample": True, "key": 0},
        [
            {"temperature": 0.3},
            {"temperature": 2.5, "top_k": 0},
            {"top_k": 90, "top_p": 0.0},
            {"top_k": 1000, "top_p": 0.5},
            {"key": 5},
            {"key": None, "eos_token_id": [8, 9]},
        ],
    ),
    "the other rules of sampling": (
        {"do_sample": True, "key": 0, "min_p": 0.1, "typical_p": 0.9, "top_h": 0.9, "epsilon_cutoff": 0.1},
        [{"min_p": 0.2, "typical_p": 0.3, "top_h": 0.4, "epsilon_cutoff": 0.02}],
    ),
    "penalties": (
        {"repetition_penalty": 1.2, "encoder_repetition_penalty": 1.1, "guidance_scale": 1.5},
        [{"repetition_penalty": 0.7, "encoder_repetition_penalty": 2.0, "guidance_scale": 3.0}],
    ),
    "lengths and lists": (
        {
            "min_length": 5,
            "min_new_tokens": 2,
            "suppress_tokens": [5],
            "begin_suppress_tokens": [6],
            "forced_eos_token_id": 7,
            "exponential_decay_length_penalty": (2, 1.1),
            "sequence_bias": [[[5], 1.0], [[5, 6, 7], 1.0], [[8, 9], 1.0]],
        },
        [
            {
                "min_length": 9,
                "min_new_tokens": 7,
                "suppress_tokens": [*range(30)],
                "begin_suppress_tokens": [],
                "forced_eos_token_id": [50, 51],
                "exponential_decay_length_penalty": (0, 1.5),
                "sequence_bias": [[[5], 9.0], [[1, 2, 3], -1.0], [[4, 4], 2.0], [[7], -3.0]],
            }
        ],
    ),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_new_numbers_compile_nothing(case: str, model: Any) -> None:
    first, others = NUMBERS[case]
    arguments = {"max_new_tokens": 10, "eos_token_id": 4, "pad_token_id": 0}
    jaxgen.generate(model, PROMPT, **{**arguments, **first})
    before = jaxgen.compile_counts()
    for other in others:
        jaxgen.generate(model, PROMPT, **{**arguments, **first, **other})
    assert jaxgen.compile_counts() == before


def test_new_weights_and_new_defaults_compile_nothing(folder: Path, tmp_path: Path) -> None:
    first, second = jaxgen.load(folder), jaxgen.load(folder)
    jaxgen.generate(first, PROMPT, max_new_tokens=8)
    before = jaxgen.compile_counts()
    second.generation_config.eos_token_id = 50
    second.embed_tokens.weight[...] *= 1.5
    assert not np.array_equal(
        jaxgen.generate(second, PROMPT, max_new_tokens=8), jaxgen.generate(first, PROMPT, max_new_tokens=8)
    )
    assert jaxgen.compile_counts() == before


def test_a_second_call_with_another_eos_stops_there(model: Any) -> None:
    """What is traced must not remember the first call's numbers."""
    free = continuation(model)[0]
    for stop in (free[2], free[5]):
        assert continuation(model, eos_token_id=stop)[0] == free[: free.index(stop) + 1]

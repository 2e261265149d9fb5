"""`custom_generate`: a caller's own loop gets what transformers would give it, and folders run with permission only."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_decoders import encoder_decoder, source
from jax import lax

import jaxgen

IDS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = np.array([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
ARGUMENTS: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 6, "eos_token_id": None}


@jax.jit
def extend(model: Any, cache: Any, input_ids: Any, attention_mask: Any, position_ids: Any = None) -> Any:
    return model.extend(cache, input_ids, attention_mask, position_ids)


def greedy(
    model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, cache: Any,
    attention_mask: Any, position_ids: Any, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """Greedy decoding as transformers' own loop has it, but for padding after the end of a row."""
    fresh = position_ids.shape[1]
    logits, cache, _ = extend(model, cache, input_ids[:, -fresh:], attention_mask[:, -fresh:], position_ids)
    while True:
        scores = logits_processor(input_ids, logits)
        tokens = scores.argmax(axis=1)[:, None]
        input_ids = jnp.concatenate([input_ids, tokens], axis=1)
        if stopping_criteria(input_ids, scores).all():
            return input_ids
        logits, cache, _ = extend(model, cache, tokens, jnp.ones_like(tokens, bool))


def compiled(
    model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, cache: Any,
    attention_mask: Any, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """The same as one compiled loop over a buffer of fixed width."""
    columns, longest = input_ids.shape[1], generation_config.max_length

    @jax.jit
    def run(model: Any, cache: Any) -> Any:
        logits, cache, _ = model.extend(cache, input_ids, attention_mask)
        text = jnp.pad(input_ids, ((0, 0), (0, longest - columns)))

        def step(carry: Any) -> Any:
            text, cur_len, cache, logits, states, _ = carry
            scores, states = logits_processor.step(text, logits, cur_len, states)
            tokens = scores.argmax(axis=1)[:, None].astype(text.dtype)
            text = lax.dynamic_update_slice_in_dim(text, tokens, cur_len, axis=1)
            done = stopping_criteria(text, scores, cur_len + 1).all()
            logits, cache, _ = model.extend(cache, tokens, jnp.ones_like(tokens, bool))
            return text, cur_len + 1, cache, logits, states, done

        start = text, jnp.int32(columns), cache, logits, logits_processor.init(), jnp.bool_(False)
        return lax.while_loop(lambda carry: ~carry[-1], step, start)[:2]

    text, cur_len = run(model, cache.grow(cache.slots + 1))
    return text[:, :cur_len]


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rules that remember": {"repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "no_repeat_ngram_size": 2},
    "ends": {"eos_token_id": [*range(20, 97)], "min_new_tokens": 3},
    "rules of the caller's": {
        "logits_processor": [lambda ids, scores: scores * (1 if ids.shape[1] < 7 else -1)],
        "stopping_criteria": [lambda ids, scores: ids.shape[1] >= 9],
    },
}


@pytest.mark.parametrize(
    ("loop", "rules"),
    [*((greedy, rules) for rules in RULES), (compiled, "rules that remember"), (compiled, "rules of the caller's")],
)
def test_a_loop_of_the_callers_own_gives_the_tokens_of_generate(loop: Any, rules: str, model: Any) -> None:
    arguments = {**ARGUMENTS, **RULES[rules]}
    rows = {"attention_mask": MASK[1:2]} if rules == "ends" else {}  # of a batch the loop would not pad finished rows
    ids = IDS[1:2] if rules == "ends" else IDS
    expected = jaxgen.generate(model, ids, **{**arguments, **rows})
    got = jaxgen.generate(model, ids, custom_generate=loop, **{**arguments, **rows})
    np.testing.assert_array_equal(got, expected)


def test_rules_that_remember_say_how_to_use_them_inside_jit(model: Any) -> None:
    def wrong(model: Any, input_ids: Any, logits_processor: Any, **kwargs: Any) -> Any:
        return jax.jit(lambda ids, scores: logits_processor(ids, scores))(input_ids, jnp.zeros((len(input_ids), 97)))

    with pytest.raises(ValueError, match=r"Use `states = logits_processor\.init\(\)`"):
        jaxgen.generate(model, IDS, custom_generate=wrong, repetition_penalty=1.5, **ARGUMENTS)
    jaxgen.generate(model, IDS, custom_generate=wrong, no_repeat_ngram_size=2, **ARGUMENTS)


def test_a_loop_goes_on_from_a_cache(model: Any) -> None:
    start = jaxgen.generate(model, IDS, return_dict_in_generate=True, **ARGUMENTS)
    mask = np.pad(MASK, ((0, 0), (0, 6)), constant_values=1)
    arguments = {**ARGUMENTS, "attention_mask": mask}
    expected = jaxgen.generate(model, start.sequences, **arguments)
    got = jaxgen.generate(model, start.sequences, cache=start.cache, custom_generate=greedy, **arguments)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 6, "do_sample": True, "temperature": 0.5, "top_k": 7, "num_return_sequences": 2},
        {"max_length": 9, "num_beams": 3, "repetition_penalty": 1.2, "eos_token_id": [4, 5], "pad_token_id": 0},
        {"max_new_tokens": 2, "eos_token_id": None, "flavour": "sweet"},
    ],
    ids=str,
)
def test_what_a_function_gets_is_what_transformers_gives_it(arguments: Any, model: Any, twin: Any) -> None:
    import torch

    seen: list[dict[str, Any]] = []

    def look(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        flavour: Any = None, **model_kwargs: Any,
    ) -> str:  # fmt: skip
        config = generation_config
        seen.append(
            {
                "input_ids": np.asarray(input_ids).tolist(),
                "mask": np.asarray(model_kwargs["attention_mask"]).astype(int).tolist(),
                "positions": np.asarray(model_kwargs["position_ids"]).tolist(),
                "use_cache": model_kwargs["use_cache"],
                "config": [config.max_length, config.num_beams, config.temperature, config.eos_token_id],
                "criteria": len(stopping_criteria),
                "ends": any(hasattr(each, "eos_token_id") for each in stopping_criteria),
                "flavour": flavour,
            }
        )
        scores = (
            torch.zeros(len(input_ids), 97) if isinstance(input_ids, torch.Tensor) else jnp.zeros((len(input_ids), 97))
        )
        seen[-1]["processed"] = np.asarray(logits_processor(input_ids, scores + 1.5)).tolist()
        seen[-1]["finished"] = np.asarray(stopping_criteria(input_ids, scores)).tolist()
        return "whatever it returns"

    ours = jaxgen.generate(model, IDS, attention_mask=MASK, custom_generate=look, **arguments)
    theirs = twin.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK), custom_generate=look, **arguments)
    assert ours == theirs == "whatever it returns"
    mine, expected = seen
    np.testing.assert_allclose(mine.pop("processed"), expected.pop("processed"), rtol=1e-6)
    assert mine == expected


def test_a_key_and_a_tokenizer_reach_a_function_that_takes_them(model: Any) -> None:
    def take(model: Any, input_ids: Any, key: Any, tokenizer: Any, **kwargs: Any) -> Any:
        return key, tokenizer

    assert jaxgen.generate(model, IDS, custom_generate=take, key=3, tokenizer="its own", **ARGUMENTS) == (3, "its own")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a number": (3, {}, "`custom_generate`=3 must be a function, or the name"),
    "a key nobody takes": (greedy, {"key": 1}, "has no argument `key`, but one was passed"),
    "a streamer": (
        greedy,
        {"streamer": type("S", (), {"put": print, "end": print})()},
        "`streamer` cannot be combined with",
    ),
    "a limit of time": (greedy, {"max_time": 1.0}, "`max_time` cannot be combined with"),
    "guidance": (greedy, {"guidance_scale": 2.0}, "`guidance_scale` cannot be combined with"),
    "an argument that nobody knows": (greedy, {"flavour": 1}, "not used by the model: .'flavour'"),
    "an id without permission": ("someone/something", {}, "pass the argument `trust_remote_code=True`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_function_could_not_heed_is_refused(case: str, model: Any) -> None:
    custom, kwargs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, IDS, custom_generate=custom, **ARGUMENTS, **kwargs)


def test_streams_and_prepared_calls_take_none(model: Any) -> None:
    for function in (jaxgen.stream, jaxgen.prepare):
        with pytest.raises(ValueError, match="`custom_generate` is not supported"):
            function(model, IDS, custom_generate=greedy, **ARGUMENTS)


# ---- Folders ----

CODE = """
def generate(model, inputs, synced_gpus, left_padding=None, **kwargs):
    assert "custom_generate" not in kwargs and "trust_remote_code" not in kwargs
    return left_padding, sorted(name for name, value in kwargs.items() if value is not None)
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "recipe" / "custom_generate"
    folder.mkdir(parents=True)
    (folder / "generate.py").write_text(CODE)
    return folder.parent


def test_a_folder_gets_the_arguments_as_they_are(recipe: Path, model: Any) -> None:
    got = jaxgen.generate(model, IDS, custom_generate=str(recipe), trust_remote_code=True, left_padding=3, max_length=7)
    assert got == (3, ["max_length"])


@pytest.mark.oracle
def test_a_folder_gets_what_transformers_gives_it(recipe: Path, model: Any, twin: Any) -> None:
    (recipe / "custom_generate" / "generate.py").write_text("def generate(**kwargs):\n    return sorted(kwargs)\n")
    given = {"custom_generate": str(recipe), "trust_remote_code": True, "max_length": 7, "key": None}
    theirs = twin.generate(IDS, **given)
    assert [*jaxgen.generate(model, IDS, **given), "key"] == [*(name for name in theirs if name != "key"), "key"]


@pytest.mark.oracle
@pytest.mark.parametrize("permission", [{}, {"trust_remote_code": False}], ids=str)
def test_a_folder_without_permission_is_refused_in_transformers_words(
    permission: Any, recipe: Path, model: Any, twin: Any
) -> None:
    with pytest.raises(ValueError, match="contains custom generation code") as ours:
        jaxgen.generate(model, IDS, custom_generate=str(recipe), **permission)
    with pytest.raises(ValueError) as theirs:
        twin.generate(IDS, custom_generate=str(recipe), trust_remote_code=False)
    assert str(ours.value) == str(theirs.value)


def test_a_folder_without_the_file_or_with_unmet_requirements_is_refused(recipe: Path, model: Any) -> None:
    with pytest.raises(OSError, match="does not contain a `custom_generate` subdirectory"):
        jaxgen.generate(model, IDS, custom_generate=str(recipe.parent), trust_remote_code=True)
    (recipe / "custom_generate" / "requirements.txt").write_text("a_package_that_does_not_exist\nnumpy>=99\n")
    with pytest.raises(ImportError, match="a_package_that_does_not_exist"):
        jaxgen.generate(model, IDS, custom_generate=str(recipe), trust_remote_code=True)


def test_the_repositories_of_built_in_decodings_need_no_download(model: Any) -> None:
    arguments = {"penalty_alpha": 0.6, "top_k": 4, **ARGUMENTS}
    hub = {"custom_generate": "transformers-community/contrastive-search", "trust_remote_code": True}
    expected = jaxgen.generate(model, IDS, **arguments)
    np.testing.assert_array_equal(jaxgen.generate(model, IDS, **hub, **arguments), expected)


def test_a_loop_over_an_encoder_decoder_model_gets_the_decoders_text_and_a_cache_with_the_source() -> None:
    model, (ids, mask) = jaxgen.from_config(encoder_decoder(1).config, key=0), source(np.random.default_rng(0), 1)
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    arguments |= {"repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1}
    seen: list[tuple[int, ...]] = []

    def of_decoder(model: Any, input_ids: Any, attention_mask: Any, decoder_attention_mask: Any, **given: Any) -> Any:
        seen.append(attention_mask.shape)
        return greedy(model, input_ids, attention_mask=decoder_attention_mask, **given)

    for more in ({}, {"decoder_input_ids": np.full((len(ids), 3), 5)}):
        expected = jaxgen.generate(model, ids, **arguments, **more)
        got = jaxgen.generate(model, ids, custom_generate=of_decoder, **arguments, **more)
        np.testing.assert_array_equal(got, expected)
    start = jaxgen.generate(model, ids, return_dict_in_generate=True, **arguments)
    more = {"decoder_input_ids": start.sequences, "cache": start.cache}
    expected = jaxgen.generate(model, ids, **arguments, **more)
    np.testing.assert_array_equal(
        jaxgen.generate(model, ids, custom_generate=of_decoder, **arguments, **more), expected
    )
    assert seen == [mask.shape] * 3

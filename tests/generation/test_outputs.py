"""`return_dict_in_generate`: every output with the shapes and numbers of transformers, and those it lacks."""

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from architectures import architecture
from oracle import torch_model
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen import lazy

IDS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = np.array([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
COLUMNS, STEPS, LAYERS, VOCAB = 5, 6, 2, 97
INTERNALS = {"output_attentions": True, "output_hidden_states": True}
EVERYTHING = {"output_scores": True, "output_logits": True, "output_logprobs": True, **INTERNALS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = architecture(1).write(tmp_path_factory.mktemp("model"))
    return jaxgen.load(folder), folder


def output(model: Any, **kwargs: Any) -> Any:
    arguments = {"attention_mask": MASK, "max_new_tokens": STEPS, "eos_token_id": None, "return_dict_in_generate": True}
    return jaxgen.generate(model, IDS, **{**arguments, **kwargs})


def test_shapes_are_those_of_transformers_with_a_leading_axis_of_steps(models: tuple[Any, Any]) -> None:
    out = output(models[0], do_sample=True, num_return_sequences=2, key=0, **EVERYTHING)
    rows = 6
    assert out.sequences.shape == (rows, COLUMNS + STEPS)
    assert out.scores.shape == out.logits.shape == (STEPS, rows, VOCAB)
    assert out.logprobs.shape == out.processed_logprobs.shape == (rows, STEPS)
    assert [[layer.shape for layer in step] for step in out.attentions] == [
        [(rows, 4, COLUMNS if step == 0 else 1, COLUMNS + step)] * LAYERS for step in range(STEPS)
    ]
    assert [[layer.shape for layer in step] for step in out.hidden_states] == [
        [(rows, COLUMNS if step == 0 else 1, 32)] * (LAYERS + 1) for step in range(STEPS)
    ]
    past = out.cache
    assert len(past) == LAYERS and past.get_seq_length() == COLUMNS + STEPS - 1
    assert [each.shape for each in past[-1]] == [(rows, 2, COLUMNS + STEPS - 1, 8)] * 2


def assert_same_intermediates(ours: Any, theirs: Any) -> None:
    for name in ("attentions", "hidden_states"):
        for step, (mine, other) in enumerate(zip(ours[name], theirs[name], strict=True)):
            for layer, expected in zip(mine, other, strict=True):
                expected = expected.detach().numpy()
                assert layer.shape == expected.shape
                if step == 0:  # what masked columns see and hold is nobody's business
                    seen = (
                        (slice(None), slice(2, None)) if name == "hidden_states" else (..., slice(2, None), slice(None))
                    )
                    layer, expected = layer[seen], expected[seen]
                np.testing.assert_allclose(layer, expected, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_every_number_equals_transformers(repetition_penalty: float, models: tuple[Any, Any]) -> None:
    import torch

    twin = torch_model(models[1])
    twin.set_attn_implementation("eager")
    arguments = {"max_new_tokens": STEPS, "eos_token_id": None, "repetition_penalty": repetition_penalty}
    flags = {"output_scores": True, "output_logits": True, **INTERNALS}
    theirs = twin.generate(
        torch.tensor(IDS), attention_mask=torch.tensor(MASK), return_dict_in_generate=True, **flags, **arguments
    )
    ours = output(models[0], repetition_penalty=repetition_penalty, **flags)
    assert ours.keys() == list(theirs.keys())
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        np.testing.assert_allclose(ours[name], np.stack([step.numpy() for step in theirs[name]]), atol=1e-4)
    assert_same_intermediates(ours, theirs)
    for (keys, values), other in zip(ours.cache, theirs.past_key_values.layers, strict=True):
        np.testing.assert_allclose(keys[:, :, 2:], other.keys.detach().numpy()[:, :, 2:], atol=1e-4)
        np.testing.assert_allclose(values[:, :, 2:], other.values.detach().numpy()[:, :, 2:], atol=1e-4)
    for normalize in (False, True):
        np.testing.assert_allclose(
            jaxgen.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=normalize),
            twin.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=normalize).numpy(),
            atol=1e-4,
        )


@pytest.mark.oracle
def test_every_number_of_beams_equals_transformers(models: tuple[Any, Any]) -> None:
    import torch

    twin = torch_model(models[1])
    twin.set_attn_implementation("eager")
    arguments = {
        "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20, "eos_token_id": [*range(20, 40)],
        "pad_token_id": 0, "early_stopping": True,
    }  # fmt: skip
    flags = {"output_scores": True, "output_logits": True, **INTERNALS}
    theirs = twin.generate(
        torch.tensor(IDS), attention_mask=torch.tensor(MASK), return_dict_in_generate=True, **flags, **arguments
    )
    # At the maximum length the running beams tie at -1e9, and which of them the last cache is of would be arbitrary.
    assert len(theirs.scores) < 20
    ours = output(models[0], **arguments, **flags)
    assert ours.keys() == list(theirs.keys())
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_array_equal(ours.beam_indices, theirs.beam_indices)
    np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4)
    for name in ("scores", "logits"):
        np.testing.assert_allclose(ours[name], np.stack([step.numpy() for step in theirs[name]]), atol=1e-4)
    assert_same_intermediates(ours, theirs)
    for pair, other in zip(ours.cache, theirs.past_key_values.layers, strict=True):
        for mine, expected in zip(pair, (other.keys, other.values), strict=True):
            assert mine.shape == expected.shape
            np.testing.assert_allclose(mine[:, :, 2:], expected.detach().numpy()[:, :, 2:], atol=1e-4)
    np.testing.assert_allclose(
        jaxgen.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices),
        twin.compute_transition_scores(theirs.sequences, theirs.scores, theirs.beam_indices).numpy(),
        atol=1e-4,
    )


def test_transition_scores_of_two_calls_are_refused(models: tuple[Any, Any]) -> None:
    out = output(models[0], output_scores=True)
    with pytest.raises(ValueError, match="2 sequences of 11 columns do not belong to scores of 6 steps and 3 rows"):
        jaxgen.compute_transition_scores(out.sequences[:2], out.scores)
    with pytest.raises(ValueError, match=r"must be .steps, rows, vocabulary. and .rows, columns."):
        jaxgen.compute_transition_scores(out.sequences, out.scores[0])


@pytest.mark.parametrize("arguments", [{"top_k": 5}, {"top_k": 0}, {"top_k": 0, "typical_p": 0.6}], ids=str)
def test_logprobs_are_those_of_the_chosen_tokens_without_the_vocabulary(
    arguments: Any, models: tuple[Any, Any]
) -> None:
    arguments = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "key": 1, **arguments}
    alone = output(models[0], output_logprobs=True, **arguments)
    assert alone.keys() == ["sequences", lazy.cache_name(), "logprobs", "processed_logprobs"]
    whole = output(models[0], output_logprobs=True, output_scores=True, output_logits=True, **arguments)
    np.testing.assert_array_equal(alone.sequences, whole.sequences)
    for name, scores in (("logprobs", whole.logits), ("processed_logprobs", whole.scores)):
        expected = jaxgen.compute_transition_scores(whole.sequences, scores, normalize_logits=True)
        np.testing.assert_allclose(alone[name], expected, atol=1e-5)
        np.testing.assert_allclose(whole[name], expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_raw_and_processed_logprobs_are_those_of_the_draw(
    temperature: float, models: tuple[Any, Any]
) -> None:
    model = models[0]
    ids = IDS[1:]
    arguments = {"do_sample": True, "top_k": 0, "key": 3, "return_dict_in_generate": True, "output_logprobs": True}
    arguments |= {"temperature": temperature, "max_new_tokens": STEPS, "eos_token_id": None}
    out = jaxgen.generate(model, ids, **arguments)
    logits = model(out.sequences)[:, COLUMNS - 1 : -1]
    for name, scores in (("logprobs", logits), ("processed_logprobs", logits / temperature)):
        every = jax.nn.log_softmax(scores)
        expected = np.take_along_axis(np.asarray(every), out.sequences[:, COLUMNS:, None], axis=2)[:, :, 0]
        np.testing.assert_allclose(out[name], expected, atol=1e-4)


def test_logprobs_after_the_end_of_a_row_are_zero(models: tuple[Any, Any]) -> None:
    new = output(models[0]).sequences[:, COLUMNS:]
    eos = int(new[0, 1])
    out = output(models[0], eos_token_id=eos, pad_token_id=0, output_logprobs=True)
    assert (out.logprobs[0, 2:] == 0).all() and (out.logprobs[0, :2] < 0).all()


def test_without_return_dict_the_flags_are_ignored_as_in_transformers_but_ours_is_refused(
    models: tuple[Any, Any],
) -> None:
    plain = output(models[0], return_dict_in_generate=False, output_scores=True)
    np.testing.assert_array_equal(plain, output(models[0]).sequences)
    with pytest.raises(ValueError, match=r"`output_logprobs`=True.*Pass `return_dict_in_generate=True` too"):
        output(models[0], return_dict_in_generate=False, output_logprobs=True)


# ---- Without a cache ----


def test_use_cache_false_changes_no_token_and_returns_no_cache(models: tuple[Any, Any]) -> None:
    out = output(models[0], use_cache=False)
    np.testing.assert_array_equal(out.sequences, output(models[0]).sequences)
    assert out.cache is None


ENDS = {"eos_token_id": [*range(20, 40)], "pad_token_id": 0}
WITHOUT_A_CACHE: dict[str, dict[str, Any]] = {
    "greedy": ENDS,
    "a single token": {"max_new_tokens": 1},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 40},
    "guidance": {"guidance_scale": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20, "early_stopping": True, **ENDS},
    "beams and a single token": {"num_beams": 2, "max_new_tokens": 1},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", WITHOUT_A_CACHE)
def test_without_a_cache_the_intermediates_of_the_whole_text_come_at_every_step_as_in_transformers(
    kind: str, models: tuple[Any, Any]
) -> None:
    import torch

    twin = torch_model(models[1])
    twin.set_attn_implementation("eager")
    arguments = {"max_new_tokens": STEPS, "eos_token_id": None, **WITHOUT_A_CACHE[kind], **INTERNALS}
    arguments |= {"use_cache": False, "return_dict_in_generate": True}
    drawn = "do_sample" in arguments
    with in_jaxgen() if drawn else contextlib.nullcontext():
        ours = output(models[0], **arguments, **({"key": 0} if drawn else {}))
    with in_torch():
        theirs = twin.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK), **arguments)
    assert ours.keys() == list(theirs.keys())
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    columns = [step[0].shape[1] for step in ours.hidden_states]
    assert columns == [*range(COLUMNS, COLUMNS + len(columns))]
    for name, seen in (("hidden_states", np.s_[:, 2:]), ("attentions", np.s_[:, :, 2:])):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            for layer, expected in zip(mine, other, strict=True):
                assert layer.shape == expected.shape
                np.testing.assert_allclose(layer[seen], expected.numpy()[seen], atol=1e-4)


def test_the_whole_texts_of_one_beam_are_views_that_cannot_be_written(models: tuple[Any, Any]) -> None:
    out = output(models[0], use_cache=False, **INTERNALS)
    for name in ("attentions", "hidden_states"):
        assert np.shares_memory(out[name][0][0], out[name][-1][0])
        with pytest.raises(ValueError, match="read-only"):
            out[name][0][0][:] = 0


def test_whole_texts_that_do_not_fit_or_go_on_from_a_cache_are_refused(models: tuple[Any, Any]) -> None:
    room = {"use_cache": False, "output_hidden_states": True}
    with pytest.raises(ValueError, match="GB for `output_hidden_states`"):
        output(models[0], num_beams=2, max_new_tokens=1_000_000, **room)
    past = output(models[0]).cache
    ids = np.concatenate([IDS, IDS, IDS], axis=1)
    with pytest.raises(ValueError, match="cannot be combined with `cache`"):
        jaxgen.generate(models[0], ids, cache=past, return_dict_in_generate=True, max_new_tokens=20, **room)
    with pytest.raises(ValueError, match="cannot be combined with `penalty_alpha`"):
        output(models[0], penalty_alpha=0.5, top_k=4, **room)


def test_groups_of_beams_have_whole_texts_too(models: tuple[Any, Any]) -> None:
    groups = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, **ENDS, **INTERNALS}
    whole, each = output(models[0], use_cache=False, **groups), output(models[0], **groups)
    for step, (mine, expected) in enumerate(zip(whole.hidden_states, each.hidden_states, strict=True)):
        assert mine[-1].shape == (12, COLUMNS + step, 32)
        np.testing.assert_array_equal(mine[-1][:, -1:], expected[-1][:, -1:])


@pytest.mark.parametrize("flag", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_outputs_that_do_not_fit_are_refused_with_their_size_before_anything_is_built(
    flag: str, models: tuple[Any, Any]
) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(
        ValueError, match=rf"GB for `{flag}`, but the device has .* GB. Lower .* or ask for fewer outputs"
    ):
        output(models[0], max_new_tokens=60_000_000, **{flag: True})
    assert jaxgen.compile_counts() == before


def test_outputs_are_arrays_of_the_callers_own(models: tuple[Any, Any]) -> None:
    out = output(models[0], output_scores=True, output_logprobs=True)
    for array in (out.sequences, out.scores, out.logprobs):
        array[0] = 0
    assert all(isinstance(each, jax.Array) for each in out.cache[0])

"""The caller's own processors and criteria: compiled JAX functions, NumPy ones, transformers' own, and their errors."""

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen import lazy
from jaxgen.generation import processor_list, user_warnings

IDS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = np.array([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
ARGUMENTS: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 10, "eos_token_id": None}


def ours(model: Any, **kwargs: Any) -> np.ndarray:
    return jaxgen.generate(model, IDS, **{**ARGUMENTS, **kwargs})


def theirs(twin: Any, **kwargs: Any) -> np.ndarray:
    import torch

    arguments = {**ARGUMENTS, **kwargs, "attention_mask": torch.tensor(MASK)}
    return twin.generate(torch.tensor(IDS), **arguments).numpy()


def negate_late(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return jnp.where(cur_len >= 7, -scores, scores)


def negate_late_in_numpy(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return -scores if input_ids.shape[1] >= 7 else scores


def stop_row(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    """Row r ends with r + 2 new tokens."""
    return cur_len >= 7 + jnp.arange(len(input_ids))


def stop_row_in_numpy(input_ids: np.ndarray, scores: None) -> np.ndarray:
    return input_ids.shape[1] >= 7 + np.arange(len(input_ids))


# ---- Processors ----


def test_a_jax_function_and_a_numpy_function_give_the_same_tokens(model: Any) -> None:
    compiled = ours(model, logits_processor=[negate_late])
    np.testing.assert_array_equal(ours(model, logits_processor=[negate_late_in_numpy]), compiled)
    plain = ours(model)
    np.testing.assert_array_equal(compiled[:, :7], plain[:, :7])
    assert (compiled[:, 7:] != plain[:, 7:]).any(axis=1).all()


@pytest.mark.oracle
def test_transformers_own_processors_run_as_they_are(model: Any, twin: Any) -> None:
    import torch
    import transformers

    class NegateLate(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            assert isinstance(scores, torch.Tensor) and input_ids.dtype == torch.long
            return torch.from_numpy(negate_late_in_numpy(input_ids.numpy(), scores.numpy()))

    processors = transformers.LogitsProcessorList(
        [NegateLate(), transformers.NoRepeatNGramLogitsProcessor(1), transformers.TemperatureLogitsWarper(0.5)]
    )
    expected = theirs(twin, logits_processor=processors)
    np.testing.assert_array_equal(ours(model, logits_processor=processors), expected)


@pytest.mark.oracle
def test_a_processor_of_a_built_ins_type_takes_its_place_with_a_warning(
    model: Any, twin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    user_warnings._warned.clear()
    processors = [transformers.RepetitionPenaltyLogitsProcessor(3.0)]
    arguments = {"repetition_penalty": 1.1, "suppress_tokens": [20, 30], "logits_processor": processors}
    with caplog.at_level("WARNING", logger="jaxgen"):
        output = ours(model, **arguments)
    assert "RepetitionPenaltyLogitsProcessor'> will take precedence" in caplog.text
    np.testing.assert_array_equal(output, theirs(twin, **arguments))
    assert (output != ours(model, repetition_penalty=1.1, suppress_tokens=[20, 30])).any()


def test_custom_processors_see_the_callers_rows_and_columns_only(model: Any) -> None:
    shapes = []

    def look(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        shapes.append((input_ids.shape, scores.shape))
        np.testing.assert_array_equal(input_ids[:, :5], IDS)
        return scores

    np.testing.assert_array_equal(ours(model, logits_processor=[look], max_new_tokens=3), ours(model)[:, :8])
    assert shapes == [((3, columns), (3, 97)) for columns in (5, 6, 7)]


def test_they_act_before_the_rules_of_sampling(model: Any) -> None:
    def only_two(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.full_like(scores, -1e9).at[:, 40:42].set(jnp.array([0.0, 0.1]))

    new = ours(model, logits_processor=[only_two], do_sample=True, top_k=2, key=0)[:, 5:]
    assert set(new.ravel().tolist()) == {40, 41}
    assert (ours(model, logits_processor=[only_two], do_sample=True, top_k=1, key=0)[:, 5:] == 41).all()


def test_a_new_instance_on_the_host_and_new_numbers_of_a_pytree_compile_nothing(model: Any) -> None:
    def bias(amount: jax.Array, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return scores.at[:, 50].add(amount)

    outputs = []
    for amount in (0.0, 100.0):
        ours(model, logits_processor=[lambda ids, scores, amount=amount: scores + amount])
        outputs.append(ours(model, logits_processor=[jax.tree_util.Partial(bias, jnp.float32(amount))]))
        before = before if amount else jaxgen.compile_counts()  # noqa: F821
    assert jaxgen.compile_counts() == before
    assert (outputs[1][:, 5:] == 50).all() and not (outputs[0][:, 5:] == 50).all()


def test_python_on_the_host_is_announced_once_with_its_price(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    user_warnings._warned.clear()
    with caplog.at_level("WARNING", logger="jaxgen"):
        for _ in range(2):
            ours(model, logits_processor=[negate_late_in_numpy])
    assert caplog.text.count("every step waits for it and copies the scores") == 1
    caplog.clear()
    with caplog.at_level("WARNING", logger="jaxgen"):
        ours(model, logits_processor=[negate_late])
    assert caplog.text == ""


class Bias:
    """A class that jax knows nothing of: two of it with the same number are two constants."""

    def __init__(self, amount: float):
        self.amount = amount

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return scores + self.amount


def amount_first(amount: float, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return scores + amount


def amount_last(amount: float) -> Any:
    def finished(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return cur_len > amount

    return finished


MADE_ANEW: dict[str, tuple[str, Any, str]] = {
    "a lambda": ("logits_processor", lambda: lambda ids, scores, cur_len: scores, "lambda"),
    "a jitted lambda": ("logits_processor", lambda: jax.jit(lambda ids, scores, cur_len: scores), "lambda"),
    "a closure": ("stopping_criteria", lambda: amount_last(7), "amount_last.<locals>.finished"),
    "a partial": ("logits_processor", lambda: functools.partial(amount_first, 1.0), "amount_first"),
    "an object": ("logits_processor", lambda: Bias(1.0), "Bias"),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.sweep] if kind in ("a jitted lambda", "a partial") else [])
        for kind in MADE_ANEW
    ],
)
def test_a_jax_function_made_anew_for_each_call_is_announced_once(
    kind: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    argument, make, name = MADE_ANEW[kind]
    user_warnings._warned.clear()
    processor_list._constants.clear()
    made = []
    with caplog.at_level("WARNING", logger="jaxgen"):
        for _ in range(2):
            made.append(make())
            jaxgen.prepare(model, IDS, **ARGUMENTS, **{argument: [made[0], made[0]]})
        assert caplog.text == ""
        for _ in range(3):
            made.append(make())
            jaxgen.prepare(model, IDS, **ARGUMENTS, **{argument: [made[-1]]})
    assert caplog.text.count("which is another object than in the previous call") == 1
    assert f"`{argument}` holds `" in caplog.text and name in caplog.text
    watched = weakref.ref(made[-1])
    made.clear()
    gc.collect()
    assert watched() is None  # nothing of the caller's is held on to


def test_functions_that_compile_nothing_anew_are_not_announced(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    user_warnings._warned.clear()
    processor_list._constants.clear()
    ours(model, logits_processor=[lambda ids, scores: scores])  # which says that it runs on the host
    caplog.clear()
    pair = [amount_last(7), amount_last(9)]
    with caplog.at_level("WARNING", logger="jaxgen"):
        for amount in (1.0, 2.0):
            partial = jax.tree_util.Partial(amount_first, jnp.float32(amount))
            kwargs = {"logits_processor": [partial, negate_late], "stopping_criteria": pair}
            jaxgen.prepare(model, IDS, **ARGUMENTS, **kwargs)
            ours(model, logits_processor=[lambda ids, scores: scores], max_new_tokens=1)
    assert caplog.text == ""


def test_an_error_on_the_host_arrives_as_it_was_raised_and_the_next_call_works(model: Any) -> None:
    def fail(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if input_ids.shape[1] == 8:
            raise KeyError("of my own")
        return scores

    with pytest.raises(KeyError, match="of my own"):
        ours(model, logits_processor=[fail])
    np.testing.assert_array_equal(ours(model, logits_processor=[lambda ids, scores: scores]), ours(model))


def test_scores_of_another_shape_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"returned scores of shape \(3, 5\), but got \(3, 97\)"):
        ours(model, logits_processor=[lambda ids, scores: scores[:, :5]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([3], "`logits_processor` holds 3, which is not callable"),
        ([lambda scores: scores], "1 required arguments.*A JAX function takes"),
        (negate_late, "must be a list of callables"),
    ],
)
def test_what_is_no_processor_is_refused(wrong: Any, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ours(model, logits_processor=wrong)


# ---- prefix_allowed_tokens_fn ----


@pytest.mark.oracle
def test_allowed_tokens_by_prefix_equal_transformers(model: Any, twin: Any) -> None:
    def allowed(row: int, tokens: Any) -> list[int]:
        return [(int(tokens[-1]) * 7 + row) % 90 + 3, 50 + row, 60]

    for arguments in ({}, {"suppress_tokens": [50, 51, 52, 60], "eos_token_id": 60, "pad_token_id": 0}):
        np.testing.assert_array_equal(
            ours(model, prefix_allowed_tokens_fn=allowed, **arguments),
            theirs(twin, prefix_allowed_tokens_fn=allowed, **arguments),
        )


@pytest.mark.oracle
@pytest.mark.skipif(lazy.cache_name() != "cache", reason="transformers 5.23 numbers the rows, not the prompts")
def test_samples_of_a_prompt_get_its_number(model: Any, twin: Any) -> None:
    """Where no sample of a prompt can meet the constraint, it wins; where one can, the others end up with nothing."""

    def allowed(batch_id: int, tokens: Any) -> list[int]:
        return [(int(tokens[-1]) * 7 + batch_id) % 90 + 3, 50 + batch_id, 60, 20 + int(tokens[-1]) % 7]

    arguments = {"prefix_allowed_tokens_fn": allowed, "do_sample": True, "num_return_sequences": 2, "top_k": 0}
    with in_jaxgen():
        got = ours(model, key=0, **arguments)
    with in_torch():
        np.testing.assert_array_equal(got, theirs(twin, **arguments))


def test_no_allowed_token_or_one_that_does_not_exist_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="empty list for batch ID 1"):
        ours(model, prefix_allowed_tokens_fn=lambda row, tokens: [] if row == 1 else [5])
    with pytest.raises(ValueError, match="allowed 97 for batch ID 0, but ids of this model are 0 to 96"):
        ours(model, prefix_allowed_tokens_fn=lambda row, tokens: [5, 97])


# ---- Criteria ----


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [{}, {"eos_token_id": 50, "pad_token_id": 1}], ids=["no eos", "an eos"])
def test_criteria_of_any_kind_finish_rows_as_in_transformers(arguments: Any, model: Any, twin: Any) -> None:
    """Without an eos, a finished row goes on until all are; with one, it is padded."""
    import torch
    import transformers

    class StopRow(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.tensor(stop_row_in_numpy(input_ids, None))

    expected = theirs(twin, stopping_criteria=[StopRow()], **arguments)
    assert expected.shape == (3, 9)
    for criterion in (StopRow(), stop_row, stop_row_in_numpy):
        np.testing.assert_array_equal(ours(model, stopping_criteria=[criterion], **arguments), expected)


def test_a_criterion_may_return_one_bool_for_all_rows(model: Any) -> None:
    for criterion in (lambda ids, scores: ids.shape[1] >= 7, lambda ids, scores, cur_len: cur_len >= 7):
        assert ours(model, stopping_criteria=[criterion]).shape == (3, 7)


@pytest.mark.oracle
def test_transformers_own_length_and_eos_criteria_replace_the_built_in_ones(model: Any, twin: Any) -> None:
    import transformers

    for criterion in (
        transformers.MaxLengthCriteria(9),
        transformers.MaxLengthCriteria(40),
        transformers.MaxLengthCriteria(2),
        transformers.EosTokenCriteria([*range(20, 60)]),
    ):
        arguments = {"stopping_criteria": [criterion], "eos_token_id": 90, "pad_token_id": 0}
        np.testing.assert_array_equal(ours(model, **arguments), theirs(twin, **arguments))


@pytest.mark.oracle
def test_criteria_that_replace_built_in_ones_warn_as_in_transformers(
    model: Any, twin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    def said(logger: str, generate: Any) -> set[str]:
        caplog.clear()
        with caplog.at_level("WARNING", logger=logger):
            generate()
        return {each.message for each in caplog.records if "take precedence" in each.message}

    transformers.logging.enable_propagation()
    try:
        for criteria, arguments, warned in (
            ([transformers.MaxLengthCriteria(9)], {}, 1),
            ([transformers.EosTokenCriteria(54)], {"eos_token_id": 90}, 1),
            ([transformers.EosTokenCriteria(54)], {}, 0),
            ([transformers.MaxTimeCriteria(60.0)], {"max_time": 30.0}, 1),
            ([transformers.MaxTimeCriteria(60.0)], {}, 0),
        ):
            user_warnings._warned.clear()
            transformers.logging.get_logger("transformers").warning_once.cache_clear()
            arguments |= {"pad_token_id": 0, "stopping_criteria": criteria}
            mine = said("jaxgen", lambda arguments=arguments: ours(model, **arguments))
            assert mine == said("transformers", lambda arguments=arguments: theirs(twin, **arguments))
            assert len(mine) == warned
    finally:
        transformers.logging.disable_propagation()


@pytest.mark.oracle
def test_of_several_criteria_of_one_type_all_act(model: Any, twin: Any) -> None:
    import transformers

    for criteria in (
        [transformers.MaxLengthCriteria(12), transformers.MaxLengthCriteria(9), transformers.MaxLengthCriteria(11)],
        [transformers.EosTokenCriteria([*range(40, 60)]), transformers.EosTokenCriteria([*range(60, 80)])],
    ):
        arguments = {"stopping_criteria": criteria, "eos_token_id": 90, "pad_token_id": 0}
        np.testing.assert_array_equal(ours(model, **arguments), theirs(twin, **arguments))


@pytest.mark.oracle
def test_an_eos_criterion_beside_another_pads_finished_rows(model: Any, twin: Any) -> None:
    import transformers

    def thirds(input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids[:, -1] % 3 == 0

    class Thirds(transformers.StoppingCriteria):
        __call__ = staticmethod(thirds)  # pyright: ignore

    criteria = [transformers.EosTokenCriteria(54), Thirds()]
    arguments = {"pad_token_id": 0, "stopping_criteria": criteria}
    np.testing.assert_array_equal(ours(model, **arguments), theirs(twin, **arguments))


def test_a_large_vocabulary_travels_to_the_host_and_back() -> None:
    wide = jaxgen.from_config(
        {
            "model_type": "llama",
            "vocab_size": 130_000,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    ids, arguments = (
        np.ones((8, 4), int),
        {"max_new_tokens": 6, "eos_token_id": None, "attention_mask": np.ones((8, 4))},
    )
    expected = jaxgen.generate(wide, ids, **arguments)
    output = jaxgen.generate(wide, ids, logits_processor=[lambda ids, scores: scores], **arguments)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prefix_allowed_tokens_fn", lambda row, tokens: [5]),
        ("logits_processor", [lambda input_ids, scores: scores]),
        ("stopping_criteria", [lambda input_ids, scores: False]),
    ],
)
def test_a_host_function_is_refused_by_name_where_jax_has_no_cpu_to_call_it_on(
    argument: str, value: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with JAX_PLATFORMS=cuda."""

    def no_cpu(backend: str) -> Any:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda")
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=rf"`{argument}` runs as Python on the host.*JAX_PLATFORMS=cuda,cpu"):
        jaxgen.generate(model, [[5, 6]], max_new_tokens=3, **{argument: value})
    assert jaxgen.compile_counts() == before

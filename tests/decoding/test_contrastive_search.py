"""Contrastive search: the tokens of transformers 4.41, on record."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from removed_modes import CASES, PROGRAMS, contrastive, recorded

import jaxgen

IDS = np.array([[5, 6, 7, 8], [8, 9, 10, 11], [3, 4, 5, 6]])


def search(model: Any, ids: Any = IDS, **kwargs: Any) -> Any:
    arguments = {
        "attention_mask": np.ones_like(ids), "penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 8, "pad_token_id": 0,
        "eos_token_id": None, "return_dict_in_generate": True,
    }  # fmt: skip
    return jaxgen.generate(model, ids, **{**arguments, **kwargs})


@pytest.mark.parametrize("program", range(PROGRAMS))
def test_sequences_are_those_of_transformers_4_41(program: int, model: Any) -> None:
    for case in range(program, CASES, PROGRAMS):
        call, expected = contrastive(case), recorded()["contrastive"][case]["sequences"]
        np.testing.assert_array_equal(jaxgen.generate(model, **call), expected, err_msg=str(call))


def test_each_token_is_the_candidate_of_the_highest_rank_computed_from_scratch(model: Any) -> None:
    out = search(model, output_scores=True)

    def hidden(ids: np.ndarray) -> np.ndarray:
        cache = model.make_cache(*ids.shape)
        states = model.extend(cache, jnp.asarray(ids), jnp.ones(ids.shape, bool), None, ("hidden_states",))[2]
        last = np.asarray(states["hidden_states"][-1])
        return last / np.linalg.norm(last, axis=-1, keepdims=True)

    for step in (0, 3):
        seen = out.sequences[:, : 4 + step]
        p = np.exp(out.scores[step] - np.logaddexp.reduce(out.scores[step], axis=1)[:, None])
        candidates = np.argsort(-p, axis=1)[:, :4]
        ranks = []
        for place in range(4):
            units = hidden(np.concatenate([seen, candidates[:, place : place + 1]], axis=1))
            likeness = np.einsum("nd,nsd->ns", units[:, -1], units[:, :-1]).max(axis=1)
            ranks.append(0.4 * p[np.arange(3), candidates[:, place]] - 0.6 * likeness)
        best = candidates[np.arange(3), np.argmax(ranks, axis=0)]
        np.testing.assert_array_equal(out.sequences[:, 4 + step], best)


def test_a_row_does_not_depend_on_its_batch_mates_or_padding(model: Any) -> None:
    """In transformers 4.41 the padding is part of what tokens should differ from."""
    together = search(model).sequences[:, 4:]
    for row in range(3):
        np.testing.assert_array_equal(search(model, IDS[row : row + 1]).sequences[0, 4:], together[row])
    padded = np.concatenate([np.zeros((3, 3), int), IDS], axis=1)
    np.testing.assert_array_equal(search(model, padded, attention_mask=padded > 0).sequences[:, 7:], together)


def test_a_finished_row_is_padded_until_the_last_one_is_done(model: Any) -> None:
    new = search(model).sequences[:, 4:]
    eos = int(new[0, 2])
    out = search(model, eos_token_id=eos).sequences[:, 4:]
    end = new[0].tolist().index(eos) + 1
    np.testing.assert_array_equal(out[0], [*new[0, :end], *[0] * (out.shape[1] - end)])
    assert out.shape[1] > end


def test_outputs_have_the_shapes_of_greedy_decoding_and_belong_to_the_chosen_tokens(model: Any) -> None:
    flags = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
    out = search(model, **flags)
    greedy = search(model, penalty_alpha=None, **flags)
    assert out.keys() == greedy.keys()
    for name in ("scores", "logits"):
        assert out[name].shape == greedy[name].shape
    for name in ("attentions", "hidden_states"):
        mine, other = ([[layer.shape for layer in step] for step in each[name]] for each in (out, greedy))
        assert mine == other
    assert [each.shape for each in out.cache[0]] == [each.shape for each in greedy.cache[0]]
    # The same text seen at once gives the same states, weights, keys and values.
    text = jnp.asarray(out.sequences[:, :-1])
    cache = model.make_cache(*text.shape)
    _, cache, whole = model.extend(cache, text, jnp.ones(text.shape, bool), None, ("attentions", "hidden_states"))
    for step in range(1, 8):
        place = 3 + step
        for layer, expected in zip(out.hidden_states[step], whole["hidden_states"], strict=True):
            np.testing.assert_allclose(layer[:, 0], expected[:, place], atol=1e-4)
        for layer, expected in zip(out.attentions[step], whole["attentions"], strict=True):
            np.testing.assert_allclose(layer[:, :, 0], expected[:, :, place, : place + 1], atol=1e-4)
    for found, expected in zip(out.cache[0], cache.layer(0), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_criterion_sees_the_tokens_and_the_scores_that_chose_them(model: Any) -> None:
    plain = search(model)
    out = search(model, stopping_criteria=[lambda input_ids, scores, cur_len: (cur_len >= 6) & (scores.shape[1] == 97)])
    np.testing.assert_array_equal(out.sequences, plain.sequences[:, :6])


def test_guidance_works_and_changes_the_tokens(model: Any) -> None:
    plain, same = search(model).sequences, search(model, guidance_scale=1.0).sequences
    np.testing.assert_array_equal(same, plain)
    # Guided away from itself by any scale: no change, as long as both halves follow the same candidates.
    for scale in (1.0001, 3.0):
        guided = search(model, guidance_scale=scale, negative_prompt_ids=IDS).sequences
        np.testing.assert_array_equal(guided, plain)
    assert (search(model, guidance_scale=3.0).sequences != plain).any()


def test_a_forbidden_token_is_never_chosen_where_fewer_than_top_k_are_allowed(model: Any) -> None:
    out = search(model, suppress_tokens=[*range(3, 90)], top_k=20)
    assert not np.isin(out.sequences[:, 4:], range(3, 90)).any()


def test_no_warning_says_that_top_k_is_ignored(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        search(model)
    assert "top_k" not in caplog.text


def test_another_alpha_compiles_nothing(model: Any) -> None:
    first = search(model).sequences
    before = jaxgen.compile_counts()
    assert (search(model, penalty_alpha=0.95).sequences != first).any()
    assert jaxgen.compile_counts() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_alpha": 1.5}, "`penalty_alpha`=1.5 must be from 0 to 1"),
        ({"penalty_alpha": -0.1}, "`penalty_alpha`=-0.1 must be from 0 to 1"),
        ({"top_k": 1}, "`penalty_alpha`=0.6 chooses among the `top_k` most likely tokens, but `top_k`=1"),
        ({"top_k": 0}, "but `top_k`=0"),
        (
            {"do_sample": True},
            "`penalty_alpha`=0.6 asks for contrastive search, which neither samples nor has beams",
        ),
        ({"num_beams": 2}, "which neither samples nor has beams"),
        ({"output_logprobs": True}, "`output_logprobs` is for greedy decoding and sampling"),
    ],
    ids=str,
)
def test_is_refused_before_anything_is_compiled(arguments: Any, message: str, model: Any) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        search(model, **arguments)
    assert jaxgen.compile_counts() == before

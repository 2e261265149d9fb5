"""Encoder-decoder models: what transformers makes of the same source, and what follows from a memory that is shared."""

import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_decoders import COUNT, ROWS, VOCAB, encoder_decoder, pair, random_call, torch_generate
from random_calls import PROCESSORS, some
from removed_modes import CASES_OF_SOURCES, ENCODER_DECODERS, diverse_of_source, recorded
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen.decoding import loop

CALLS_EACH = 4
USUAL = (0, 1, 3, 4, 7, 9)  # architectures of six families; the others are for sweeps
KINDS = ("greedy", "beams")
OF_STEPS = ("decoder_attentions", "cross_attentions", "decoder_hidden_states")
OF_SOURCE = ("encoder_attentions", "encoder_hidden_states")
FLAGS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
INTERNALS = {"output_attentions": True, "output_hidden_states": True}

pytestmark = pytest.mark.oracle


# ---- Exactly as transformers ----


def combinations() -> list[Any]:
    """Every architecture with both kinds of calls; of the usual ones one kind each."""
    return [
        pytest.param(seed, kind, id=f"{encoder_decoder(seed).name}-{kind}", marks=[] if usual else [pytest.mark.sweep])
        for seed in range(COUNT)
        for kind in KINDS
        for usual in [seed in USUAL and KINDS.index(kind) == seed // 2 % 2]
    ]


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize(("seed", "kind"), combinations())
def test_tokens_scores_and_states_equal_transformers(seed: int, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(seed, tmp_path)
    rng = np.random.default_rng(seed + 1000 * KINDS.index(kind))
    about_source = ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"]
    others = {name: None for name in PROCESSORS if name not in {"guidance_scale", *about_source}}
    names = [*some(rng, dict.fromkeys(about_source), 0, 2), *some(rng, others, 0, 3)]
    internals = INTERNALS if seed % 2 == 0 else {}
    calls = [random_call(rng, names, kind, vars(theirs.config)) | internals for _ in range(CALLS_EACH)]
    ties = sum(not equal_to_transformers(ours, theirs, kwargs) for kwargs in calls)
    assert ties <= 1


def equal_to_transformers(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> bool:
    """Asserts that all is equal; False if beams with the same score are in another order, as after an equal choice."""
    told = str(kwargs)
    mine, other = jaxgen.generate(ours, **FLAGS, **kwargs), torch_generate(theirs, **FLAGS, **kwargs)
    assert mine.keys() == list(other.keys())
    if "num_beams" in kwargs and mine.sequences.shape == other.sequences.shape:
        apart = (mine.sequences != other.sequences.numpy()).any(axis=1)
        if apart.any():
            np.testing.assert_allclose(mine.sequences_scores, other.sequences_scores, rtol=1e-4, err_msg=told)
            return False
    np.testing.assert_array_equal(mine.sequences, other.sequences, err_msg=told)
    if "num_beams" in kwargs:
        np.testing.assert_array_equal(mine.beam_indices, other.beam_indices, err_msg=told)
        np.testing.assert_allclose(mine.sequences_scores, other.sequences_scores, rtol=1e-3, atol=1e-4, err_msg=told)
    for name in ("scores", "logits"):
        found, wanted = mine[name], np.stack([step.numpy() for step in other[name]])
        if "num_beams" in kwargs:  # of the beams that are returned: which of two equal ones is dropped is arbitrary
            row, step = np.nonzero(mine.beam_indices >= 0)
            found, wanted = (each[step, mine.beam_indices[row, step]] for each in (found, wanted))
        assert_close(found, wanted, f"{name} {told}")
    if "output_attentions" in kwargs:
        assert_same_intermediates(mine, other, kwargs.get("decoder_attention_mask"), kwargs["attention_mask"], told)
    return True


def assert_same_intermediates(mine: Any, other: Any, decoder_mask: Any, mask: np.ndarray, told: str) -> None:
    """Of all columns but those of padding: what these see and hold is nobody's business."""
    for name in OF_SOURCE:
        for layer, expected in zip(mine[name], other[name], strict=True):
            assert layer.shape == expected.shape
            for row, kept in enumerate(mask.astype(bool)):
                kept = np.s_[kept] if name.endswith("states") else np.s_[:, kept]
                assert_close(layer[row][kept], expected[row].numpy()[kept], f"{name} {told}")
    for name in OF_STEPS:
        for number, (step, theirs) in enumerate(zip(mine[name], other[name], strict=True)):
            for layer, expected in zip(step, theirs, strict=True):
                assert layer.shape == expected.shape, name
                if number == 0 and decoder_mask is not None:
                    continue
                assert_close(layer, expected.numpy(), f"{name} {number} {told}")


def assert_close(found: np.ndarray, expected: np.ndarray, told: str) -> None:
    """Within 1e-3, or 1e-4 of the largest number: torch in float32 is as far from torch in float64."""
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected), err_msg=told)
    largest = np.abs(np.where(np.isfinite(expected), expected, 1)).max()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * max(largest, 1), err_msg=told)


# ---- The source ----

T5_SEED, BART_SEED = 34, ENCODER_DECODERS[1]  # a UMT5 of one layer and an mBART, whose tokens vary


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(T5_SEED, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(BART_SEED, tmp_path_factory.mktemp("bart"))


@pytest.fixture(params=["t5", "bart"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(request.param)


usually_of_t5 = pytest.mark.parametrize("models", ["t5", pytest.param("bart", marks=pytest.mark.sweep)], indirect=True)
usually_of_bart = pytest.mark.parametrize(
    "models", ["bart", pytest.param("t5", marks=pytest.mark.sweep)], indirect=True
)


def in_turn(name: str, values: dict[str, Any]) -> pytest.MarkDecorator:
    """Each value with one of the two models, and with the other one in sweeps."""
    params = [
        pytest.param(model, value, id=f"{model}-{told}", marks=[] if number % 2 == index else [pytest.mark.sweep])
        for number, (told, value) in enumerate(values.items())
        for index, model in enumerate(("t5", "bart"))
    ]
    return pytest.mark.parametrize(("models", name), params, indirect=["models"])


IDS = np.random.default_rng(0).integers(3, VOCAB - 1, (ROWS, 6))
LENGTHS = np.array([6, 2, 4])
MASK = (np.arange(6) < LENGTHS[:, None]).astype(np.int64)
PLAIN: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "forced_eos_token_id": None}


def generate(model: Any, ids: Any = IDS, **kwargs: Any) -> Any:
    return jaxgen.generate(model, ids, **{"attention_mask": MASK, **PLAIN, **kwargs})


def expected(model: Any, ids: Any = IDS, **kwargs: Any) -> Any:
    return torch_generate(model, ids, **{"attention_mask": MASK, **PLAIN, **kwargs})


def test_tokens_differ_between_sources(models: tuple[Any, Any]) -> None:
    """Else most tests here would compare constants."""
    assert len({tuple(row) for row in generate(models[0]).tolist()}) == ROWS


def test_without_a_mask_padding_is_read_as_text_and_a_warning_says_so(
    models: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = models
    pad = theirs.config.pad_token_id
    ids = np.where(MASK, IDS, pad)
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        found = generate(ours, ids, attention_mask=None, pad_token_id=pad)
    np.testing.assert_array_equal(found, expected(theirs, ids, attention_mask=None))
    assert "The encoder reads this padding" in caplog.text
    assert (found != generate(ours, ids)).any()


def test_padding_on_the_left_changes_nothing_in_a_t5(t5: tuple[Any, Any]) -> None:
    ids = np.stack([np.roll(row, 6 - length) for row, length in zip(IDS, LENGTHS, strict=True)])
    np.testing.assert_array_equal(generate(t5[0], ids, attention_mask=MASK[:, ::-1]), generate(t5[0]))


def test_padding_on_the_left_counts_as_columns_in_a_bart_as_in_transformers(bart: tuple[Any, Any]) -> None:
    ids = np.stack([np.roll(row, 6 - length) for row, length in zip(IDS, LENGTHS, strict=True)])
    mask = MASK[:, ::-1].copy()
    found = generate(bart[0], ids, attention_mask=mask)
    np.testing.assert_array_equal(found, expected(bart[1], ids, attention_mask=mask))
    assert (found != generate(bart[0])).any()


def test_a_row_depends_neither_on_its_neighbours_nor_on_padding_nor_on_the_bucket(models: tuple[Any, Any]) -> None:
    ours = models[0]
    together = generate(ours, output_scores=True, return_dict_in_generate=True)
    ids, mask = (np.pad(array, ((0, 0), (0, 27))) for array in (IDS, MASK))
    wider = generate(ours, ids, attention_mask=mask, output_scores=True, return_dict_in_generate=True)
    np.testing.assert_array_equal(wider.sequences, together.sequences)
    assert_close(wider.scores, together.scores, "scores")
    for row, length in enumerate(LENGTHS):
        alone = generate(ours, IDS[row : row + 1, :length], attention_mask=None)
        np.testing.assert_array_equal(alone[0], together.sequences[row])


@in_turn("beams", {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}})
def test_the_encoders_output_takes_the_place_of_its_input_and_is_never_changed(
    beams: dict[str, Any], models: tuple[Any, Any]
) -> None:
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    ours, theirs = models
    plain = generate(ours, **beams)
    encoded = ours.encode(IDS, MASK)
    array = np.array(encoded)
    output = theirs.get_encoder()(torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    np.testing.assert_allclose(array[MASK > 0], output.last_hidden_state.detach().numpy()[MASK > 0], atol=1e-4)
    output = BaseModelOutput(torch.tensor(array))
    for given in (encoded, array, (array,), [array], {"last_hidden_state": array}, output, torch.tensor(array)):
        np.testing.assert_array_equal(generate(ours, None, encoder_outputs=given, **beams), plain)
        np.testing.assert_array_equal(generate(ours, IDS, encoder_outputs=given, **beams), plain)
    for kept in (array, output.last_hidden_state.numpy()):
        assert kept.tobytes() == np.asarray(encoded).tobytes()


@usually_of_bart
def test_the_encoders_output_without_a_mask_is_attended_in_all_columns(models: tuple[Any, Any]) -> None:
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    ours, theirs = models
    encoded = np.array(ours.encode(IDS, MASK))
    given = {"attention_mask": None, "encoder_outputs": BaseModelOutput(torch.tensor(encoded))}
    np.testing.assert_array_equal(
        generate(ours, None, attention_mask=None, encoder_outputs=encoded), expected(theirs, None, **given)
    )


def test_states_that_come_with_the_encoders_output_are_returned_as_they_are(t5: tuple[Any, Any]) -> None:
    array = np.array(t5[0].encode(IDS, MASK))
    given = {"last_hidden_state": array, "hidden_states": (array, array)}
    out = generate(t5[0], None, encoder_outputs=given, return_dict_in_generate=True, **INTERNALS)
    assert [layer.tobytes() for layer in out.encoder_hidden_states] == [array.tobytes()] * 2
    assert out.encoder_attentions is None


@pytest.mark.parametrize("shape", [(ROWS, 6), (ROWS, 6, 31), (ROWS, 0, 32)])
def test_an_encoders_output_of_another_shape_is_refused(shape: tuple[int, ...], t5: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"`encoder_outputs` has a last hidden state of shape .*, 32\]"):
        generate(t5[0], None, encoder_outputs=np.zeros(shape, np.float32))


def test_an_encoders_output_of_other_rows_is_refused(t5: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="`encoder_outputs` has 2 rows, but `input_ids` has 3"):
        generate(t5[0], IDS, encoder_outputs=np.zeros((2, 6, 32), np.float32))


def test_embeddings_of_the_source_give_the_tokens_of_its_ids(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    table = theirs.get_input_embeddings()
    embeddings = table.weight.detach().numpy()[IDS] * getattr(table, "embed_scale", 1)
    found = generate(ours, None, inputs_embeds=embeddings)
    np.testing.assert_array_equal(found, generate(ours))
    np.testing.assert_array_equal(found, expected(theirs, None, inputs_embeds=embeddings))


def test_rules_about_the_source_are_ignored_with_a_warning_if_only_embeddings_are_known(
    t5: tuple[Any, Any],
) -> None:
    embeddings = np.asarray(t5[0].embed(IDS))
    with pytest.warns(UserWarning, match="encoder_repetition_penalty|encoder_no_repeat_ngram_size"):
        found = generate(
            t5[0], None, inputs_embeds=embeddings, encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2
        )
    np.testing.assert_array_equal(found, generate(t5[0]))


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_a_mask_of_three_dimensions_is_refused(name: str, t5: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{name}` passed to `generate` must be 2D"):
        generate(t5[0], **{name: MASK[:, None]})


def test_without_any_input_the_source_is_the_bos_token(bart: tuple[Any, Any]) -> None:
    ours, theirs = bart
    options = {"attention_mask": None, "bos_token_id": 5}
    np.testing.assert_array_equal(generate(ours, None, **options), expected(theirs, None, **options))


# ---- The decoder's first tokens ----


def start_of(theirs: Any) -> int:
    return theirs.config.decoder_start_token_id


TEXTS: dict[str, Any] = {
    "none begins with the start token": lambda start: [[11, 12], [13, 14], [15, 16]],
    "one begins with it": lambda start: [[start, 12], [13, 14], [15, 16]],
    "all begin with it": lambda start: [[start, 12], [start, 14], [start, 16]],
    "it is all there is": lambda start: [[start]] * 3,
    "another token alone": lambda start: [[9]] * 3,
}


@in_turn("kind", {kind: kind for kind in TEXTS})
def test_the_start_token_is_put_before_the_decoders_tokens_unless_a_row_begins_with_it(
    kind: str, models: tuple[Any, Any]
) -> None:
    ours, theirs = models
    ids = np.array(TEXTS[kind](start_of(theirs)))
    found = generate(ours, decoder_input_ids=ids)
    np.testing.assert_array_equal(found, expected(theirs, decoder_input_ids=ids))
    added = not (ids[:, 0] == start_of(theirs)).any()
    assert found[:, added : added + ids.shape[1]].tolist() == ids.tolist()
    assert found.shape[1] == added + ids.shape[1] + PLAIN["max_new_tokens"]


@in_turn("beams", {"beams": {"num_beams": 3}, "greedy": {}})
def test_every_row_may_have_a_start_token_of_its_own(beams: dict[str, Any], models: tuple[Any, Any]) -> None:
    ours, theirs = models
    found = generate(ours, decoder_start_token_id=[7, 8, 9], **beams)
    assert found[:, 0].tolist() == [7, 8, 9]
    np.testing.assert_array_equal(found, expected(theirs, decoder_start_token_id=[7, 8, 9], **beams))


def test_start_tokens_that_do_not_fit_are_refused(t5: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="`decoder_start_token_id` expected to have length 3 but got 2"):
        generate(t5[0], decoder_start_token_id=[7, 8])
    for token in (VOCAB, -1, 1.5):
        with pytest.raises(ValueError, match=r"`decoder_start_token_id`=.* must hold ids of this model, 0 to 70"):
            generate(t5[0], decoder_start_token_id=token)
    with pytest.raises(ValueError, match="`decoder_input_ids` has 2 rows, but there are 3 prompts"):
        generate(t5[0], decoder_input_ids=[[7], [8]])


def test_masked_columns_before_a_t5s_text_change_nothing(t5: tuple[Any, Any]) -> None:
    ids, mask = np.array([[0, 0, 14], [0, 5, 6], [0, 0, 9]]), np.array([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    found = generate(t5[0], decoder_input_ids=ids, decoder_attention_mask=mask)
    np.testing.assert_array_equal(found, expected(t5[1], decoder_input_ids=ids, decoder_attention_mask=mask))
    alone = generate(t5[0], IDS[:1], attention_mask=MASK[:1], decoder_input_ids=ids[:1, 1:])
    np.testing.assert_array_equal(found[:1, 1:], alone)


def test_masked_columns_before_a_barts_text_count_as_in_transformers(bart: tuple[Any, Any]) -> None:
    start = start_of(bart[1])
    ids = np.array([[1, start, 14], [start, 5, 6], [1, start, 9]])
    arguments = {"decoder_input_ids": ids, "decoder_attention_mask": (ids != 1).astype(np.int64)}
    np.testing.assert_array_equal(generate(bart[0], **arguments), expected(bart[1], **arguments))


@in_turn(
    "lengths",
    {
        "by default": {"max_new_tokens": None},
        "max_length": {"max_new_tokens": None, "max_length": 5},
        "max_new_tokens": {"max_new_tokens": 3},
        "min_length": {"max_new_tokens": None, "max_length": 9, "min_length": 6, "eos_token_id": [*range(3, 40)]},
        "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [*range(3, 40)]},
    },
)
def test_lengths_count_the_decoders_tokens(lengths: dict[str, Any], models: tuple[Any, Any]) -> None:
    found = generate(models[0], **lengths)
    np.testing.assert_array_equal(found, expected(models[1], **lengths))
    if "max_length" in lengths and "min_length" not in lengths:
        assert found.shape == (ROWS, 5)
    if lengths == {"max_new_tokens": None}:
        assert found.shape == (ROWS, 21)


@usually_of_bart
def test_forced_tokens_are_the_first_after_a_lone_start_token_and_the_last(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    forced = {"forced_bos_token_id": 33, "forced_eos_token_id": 44, "begin_suppress_tokens": [5, 6, 7, 8]}
    found = generate(ours, **forced)
    np.testing.assert_array_equal(found, expected(theirs, **forced))
    assert (found[:, 1] == 33).all() and (found[:, -1] == 44).all()
    longer = {**forced, "decoder_input_ids": np.array([[11, 12], [13, 14], [15, 16]])}
    found = generate(ours, **longer)
    np.testing.assert_array_equal(found, expected(theirs, **longer))
    assert not (found[:, 3] == 33).all()


@usually_of_t5
def test_a_start_token_that_ends_texts_ends_none(models: tuple[Any, Any]) -> None:
    start = start_of(models[1])
    found = generate(models[0], eos_token_id=start)
    np.testing.assert_array_equal(found, expected(models[1], eos_token_id=start))
    assert found.shape[1] > 2


@usually_of_t5
def test_penalties_of_repetition_are_about_the_text_and_those_of_the_encoder_about_the_source(
    models: tuple[Any, Any],
) -> None:
    ours, theirs = models
    plain = generate(ours)
    for rule in ({"repetition_penalty": 3.0}, {"encoder_repetition_penalty": 8.0}):
        found = generate(ours, **rule)
        np.testing.assert_array_equal(found, expected(theirs, **rule))
        assert (found != plain).any()
    # Of the source, not of the padding of its bucket: ids beyond its columns get nothing.
    scores = [
        generate(ours, return_dict_in_generate=True, output_scores=True, **each).scores[0]
        for each in ({}, {"encoder_repetition_penalty": 2.0})
    ]
    for row in range(ROWS):
        changed = np.flatnonzero(~np.isclose(scores[0][row], scores[1][row], atol=1e-6))
        assert {*changed.tolist()} == {*IDS[row].tolist()}


# ---- Refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 1.5}, "`guidance_scale`=1.5 does not go with an encoder-decoder model"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha`. does not go with an encoder-decoder model"),
        ({"token_healing": True}, "`token_healing` is about the end of a prompt"),
        ({"position_ids": IDS}, r"not used by the model: \['position_ids'\]"),
        ({"assistant_early_exit": 1}, "is for models without an encoder"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_does_not_go_with_an_encoder_is_refused_by_name(
    arguments: dict[str, Any], message: str, t5: tuple[Any, Any]
) -> None:
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        generate(t5[0], **arguments)
    assert jaxgen.compile_counts() == before


@pytest.mark.parametrize("name", ["decoder_input_ids", "decoder_attention_mask", "encoder_outputs"])
def test_what_only_an_encoder_reads_is_refused_without_one(name: str, model: Any) -> None:
    with pytest.raises(ValueError, match=rf"not used by the model: \['{name}'\].*not for models without an encoder"):
        jaxgen.generate(model, [[5, 6]], max_new_tokens=2, **{name: np.ones((1, 2), int)})


def test_positions_beyond_a_learned_table_are_refused_before_anything_is_built(bart: tuple[Any, Any]) -> None:
    before, longest = jaxgen.compile_counts(), 64
    with pytest.raises(ValueError, match=r"`input_ids` has 65 columns, but the encoder has embeddings for 64"):
        jaxgen.generate(bart[0], np.full((1, longest + 1), 5), **PLAIN)
    with pytest.raises(ValueError, match=r"66 tokens are requested.*64 positions.*by 1"):
        generate(bart[0], max_new_tokens=longest + 1)
    with pytest.raises(ValueError, match="66 tokens are requested"):
        generate(bart[0], num_beams=2, decoder_input_ids=np.full((ROWS, 40), 5), max_new_tokens=25)
    assert jaxgen.compile_counts() == before
    # The last token of a text is never read.
    assert generate(bart[0], max_new_tokens=longest).shape == (ROWS, longest + 1)


# ---- Going on ----


@in_turn("given", {given: given for given in ("the whole text", "its last token")})
def test_a_text_goes_on_from_its_cache(given: str, models: tuple[Any, Any]) -> None:
    ours = models[0]
    whole = generate(ours)
    first = generate(ours, max_new_tokens=3, return_dict_in_generate=True)
    assert first.cache.get_seq_length() == 3
    text = first.sequences if given == "the whole text" else first.sequences[:, -1:]
    for mask in (None, np.ones((ROWS, 4), int)):
        found = generate(ours, cache=first.cache, decoder_input_ids=text, decoder_attention_mask=mask, max_new_tokens=5)
        np.testing.assert_array_equal(found, whole if given == "the whole text" else whole[:, 3:])


def test_the_samples_of_a_cache_go_on_with_their_sources(t5: tuple[Any, Any]) -> None:
    ours = t5[0]
    options = {"do_sample": True, "key": 3, "num_return_sequences": 2, "max_new_tokens": 3}
    first = generate(ours, **options, return_dict_in_generate=True)
    sources, masks = np.repeat(IDS, 2, axis=0), np.repeat(MASK, 2, axis=0)
    plain = generate(ours, sources, attention_mask=masks, decoder_input_ids=first.sequences)
    again = generate(ours, sources, attention_mask=masks, cache=first.cache, decoder_input_ids=first.sequences)
    np.testing.assert_array_equal(again, plain)


@usually_of_t5
def test_a_continued_cache_does_not_read_the_source_again(models: tuple[Any, Any]) -> None:
    ours = models[0]
    first = generate(ours, max_new_tokens=3, return_dict_in_generate=True)
    others = np.full_like(IDS, 7)
    continued = {"cache": first.cache, "decoder_input_ids": first.sequences, "max_new_tokens": 5}
    np.testing.assert_array_equal(generate(ours, others, **continued), generate(ours))
    assert (generate(ours, others) != generate(ours)).any()


def test_a_text_that_outgrows_its_cache_keeps_its_source(t5: tuple[Any, Any]) -> None:
    ours, options = t5[0], {"max_new_tokens": 500, "eos_token_id": None, "pad_token_id": 0}
    call = jaxgen.prepare(ours, IDS, attention_mask=MASK, **options)
    whole = np.asarray(jax.jit(jaxgen.decode)(ours, call)["sequences"])[:ROWS, :501]
    np.testing.assert_array_equal(generate(ours, **options), whole)


def test_a_cache_without_the_text_is_refused(t5: tuple[Any, Any]) -> None:
    cache = generate(t5[0], max_new_tokens=3, return_dict_in_generate=True).cache
    with pytest.raises(ValueError, match="`cache` holds 3 tokens, but there are no `decoder_input_ids`"):
        generate(t5[0], cache=cache)


def test_the_beams_of_a_cache_go_on_as_samples_of_their_sources(t5: tuple[Any, Any]) -> None:
    ours = t5[0]
    first = generate(ours, num_beams=2, num_return_sequences=2, max_new_tokens=3, return_dict_in_generate=True)
    sources, masks = np.repeat(IDS, 2, axis=0), np.repeat(MASK, 2, axis=0)
    plain = generate(ours, sources, attention_mask=masks, decoder_input_ids=first.sequences)
    assert (first.sequences[0] != first.sequences[1]).any()
    again = generate(ours, sources, attention_mask=masks, cache=first.cache, decoder_input_ids=first.sequences)
    assert again.shape == plain.shape
    # The cache is of the beams that went on, in their order, which are the best ones here.
    same = [(a == b).all() for a, b in zip(again, plain, strict=True)]
    assert sum(same) >= 3


# ---- Other ways to decode ----


@usually_of_bart
def test_drafts_change_no_token_of_ragged_rows(models: tuple[Any, Any]) -> None:
    ours = models[0]
    arguments = {"max_new_tokens": 14, "eos_token_id": [*range(20, 24)], "pad_token_id": 0}
    plain = generate(ours, **arguments)
    np.testing.assert_array_equal(generate(ours, prompt_lookup_num_tokens=3, **arguments), plain)


@usually_of_t5
def test_an_assistant_with_an_encoder_reads_the_source_and_changes_no_token(models: tuple[Any, Any]) -> None:
    ours = models[0]
    arguments = {"max_new_tokens": 13, "return_dict_in_generate": True, "eos_token_id": None}
    plain = generate(ours, **arguments)
    drafts = {"assistant_model": ours, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    assisted = generate(ours, **arguments, **drafts)
    np.testing.assert_array_equal(assisted.sequences, plain.sequences)
    # The model drafts for itself: all of its tokens are right, if its encoder has read the same source.
    assert (assisted.rounds == 4).all() and (assisted.accepted == assisted.drafted).all()
    if ours.config.model_type == "umt5":
        with pytest.raises(ValueError, match="Pass `input_ids` too"):
            jaxgen.generate(ours, encoder_outputs=ours.encode(jnp.asarray(IDS)), **arguments, **drafts)


@usually_of_bart
def test_a_stream_brings_the_new_tokens_and_a_streamer_the_start_token_first(models: tuple[Any, Any]) -> None:
    ours = models[0]
    plain = generate(ours, IDS[:1], attention_mask=MASK[:1])
    chunks = [*jaxgen.stream(ours, IDS[:1], attention_mask=MASK[:1], **PLAIN)]
    assert chunks[0].shape == (1, 1)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), plain[:, 1:])
    put: list[list[int]] = []

    class Streamer:
        def put(self, value: Any) -> None:
            put.append(np.asarray(value).reshape(-1).tolist())

        def end(self) -> None:
            put.append([-1])

    generate(ours, IDS[:1], attention_mask=MASK[:1], streamer=Streamer())
    assert put == [[token] for token in plain[0].tolist()] + [[-1]]


@usually_of_t5
def test_samples_share_their_source_and_depend_on_the_key_alone(models: tuple[Any, Any]) -> None:
    ours = models[0]
    options = {"do_sample": True, "top_k": 0, "temperature": 1.5}
    three = generate(ours, num_return_sequences=3, key=[1, 2, 3], **options)
    assert three.shape == (3 * ROWS, 9) and len({tuple(row) for row in three.tolist()}) == 3 * ROWS
    for row in range(ROWS):
        alone = generate(
            ours,
            IDS[row : row + 1],
            attention_mask=MASK[row : row + 1],
            num_return_sequences=3,
            key=[row + 1],
            **options,
        )
        np.testing.assert_array_equal(alone, three[3 * row : 3 * row + 3])


@in_turn("beams", {"alone": {}, "beams": {"num_beams": 3}, "two of each": {"num_return_sequences": 2}})
def test_with_the_same_noise_every_sampled_token_equals_transformers(
    beams: dict[str, Any], models: tuple[Any, Any]
) -> None:
    options = {"do_sample": True, "top_k": 40, "temperature": 1.3, "eos_token_id": [*range(20, 24)], **beams}
    options["pad_token_id"] = 0
    with in_jaxgen():
        found = generate(models[0], key=0, **options)
    with in_torch():
        np.testing.assert_array_equal(found, expected(models[1], **options))


@pytest.mark.parametrize("of_bart", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_groups_of_beams_are_those_of_transformers_4_41(of_bart: bool, tmp_path: Path) -> None:
    ours, _ = pair(ENCODER_DECODERS[of_bart], tmp_path)
    for case in range(of_bart, CASES_OF_SOURCES, 2):
        call, wanted = diverse_of_source(case), recorded()["diverse_of_source"][case]
        out = jaxgen.generate(ours, **call, return_dict_in_generate=True, output_scores=True)
        np.testing.assert_array_equal(out.sequences, wanted["sequences"], err_msg=str(call))
        np.testing.assert_allclose(out.sequences_scores, wanted["sequences_scores"], rtol=1e-3)


@in_turn(
    "how",
    {
        "SynthID, greedy": {"ngram_len": 3, "keys": [11, 7, 5, 3]},
        "green list, beams": {"bias": 5.0, "num_beams": 3},
    },
)
def test_watermarked_texts_are_those_of_transformers(how: dict[str, Any], models: tuple[Any, Any]) -> None:
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    beams = {name: how[name] for name in how if name == "num_beams"}
    watermark = {name: how[name] for name in how if name != "num_beams"}
    config = (SynthIDTextWatermarkingConfig if "keys" in watermark else WatermarkingConfig)(**watermark)
    found = generate(models[0], watermarking_config=config, **beams)
    np.testing.assert_array_equal(found, expected(models[1], watermarking_config=config, **beams))
    assert (found != generate(models[0], **beams)).any()


@in_turn("kind", {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}})
def test_without_a_cache_tokens_and_states_are_those_of_transformers(
    kind: dict[str, Any], models: tuple[Any, Any]
) -> None:
    ours, theirs = models
    arguments = {"use_cache": False, "return_dict_in_generate": True, **INTERNALS, **kind, "max_new_tokens": 4}
    mine, other = generate(ours, **arguments), expected(theirs, **arguments)
    assert mine.keys() == list(other.keys())
    np.testing.assert_array_equal(mine.sequences, other.sequences)
    assert_same_intermediates(mine, other, None, MASK, "without a cache")


def test_decode_goes_into_the_callers_jit_and_vmap(t5: tuple[Any, Any]) -> None:
    ours = t5[0]
    plain = generate(ours)
    one = jaxgen.prepare(ours, IDS, attention_mask=MASK, **PLAIN)
    jitted = jax.jit(lambda call: jaxgen.decode(ours, call)["sequences"])
    np.testing.assert_array_equal(jitted(one)[:ROWS, :9], plain)
    another = jaxgen.prepare(ours, IDS[::-1], attention_mask=MASK[::-1], **PLAIN)
    calls = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, another)
    found = jax.jit(jax.vmap(lambda call: jaxgen.decode(ours, call)["sequences"]))(calls)
    np.testing.assert_array_equal(found[0, :ROWS, :9], plain)
    np.testing.assert_array_equal(found[1, :ROWS, :9], plain[::-1])


# ---- Programs ----


@in_turn("kind", {"greedy": "greedy", "beams": "beams", "samples": "samples"})
def test_another_source_of_the_same_bucket_compiles_nothing(kind: str, models: tuple[Any, Any]) -> None:
    ours = models[0]
    kinds = {"beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 2, "key": 0}}
    arguments = {"encoder_repetition_penalty": 1.5, "repetition_penalty": 1.1, **kinds.get(kind, {})}
    generate(ours, **arguments)
    before = jaxgen.compile_counts()  # with beams, new tokens have a bucket of their own: 7 and 8
    rng = np.random.default_rng(1)
    for columns in (1, 3, 7, 13, 16):
        changes: dict[str, Any] = {"encoder_repetition_penalty": 1 + columns / 10, "max_new_tokens": 7 + columns % 2}
        if kind == "samples":
            changes["key"] = columns
        ids = rng.integers(3, VOCAB, (ROWS, columns))
        generate(ours, ids, attention_mask=np.ones_like(ids), decoder_start_token_id=columns, **arguments | changes)
    assert jaxgen.compile_counts() == before


@in_turn("rows", {"1": 1, "3": 3})
def test_the_beams_of_a_source_read_one_copy_of_its_memory(rows: int, models: tuple[Any, Any]) -> None:
    """No array of the program that goes on, and none of the first, has it once for each beam."""
    ours, columns, beams = models[0], 112, 5
    if rows * columns > 64 and ours.has_position_table:
        columns = 64
    call = jaxgen.prepare(ours, np.full((rows, columns), 5), num_beams=beams, **PLAIN)
    state = jax.eval_shape(lambda: loop._prefill(ours, call))
    heads, width = ours.config.heads[1], ours.config.head_dim
    batch, slots = call.source.attention_mask.shape
    of_memory = batch * heads * slots * width
    programs = (
        loop.prefill.lower(ours, call),
        loop.advance.lower(ours, state, call.strategy, np.int32(1)),
    )
    for number, program in enumerate(programs):
        shapes = set(re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", program.compile().as_text()))
        sizes = {shape: np.prod([int(each) for each in shape.split(",")]) for shape in shapes}
        with_source = {shape: size for shape, size in sizes.items() if str(slots) in shape.split(",")}
        assert any(size >= of_memory for size in with_source.values()) or number == 0
        expanded = [
            shape
            for shape, size in with_source.items()
            if size >= beams * of_memory and {str(slots), str(width)} <= {*shape.split(",")}
        ]
        assert expanded == []

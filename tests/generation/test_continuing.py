"""What goes on from a cache, from embeddings or at other positions: tokens of transformers, and of one long call."""

import copy
import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from architectures import architecture
from oracle import torch_model
from prepared import prepared

import jaxgen
from jaxgen import lazy
from jaxgen.buckets import bucket
from jaxgen.decoding import loop
from jaxgen.generation.running.driver import cache_sizes

RNG = np.random.default_rng(0)
ROWS, COLUMNS, NEW = 3, 9, 6
PADDING = np.array([0, 3, 5])
MASK = (np.arange(COLUMNS) >= PADDING[:, None]).astype(int)
IDS = np.where(MASK, RNG.integers(3, 97, (ROWS, COLUMNS)), 0)
PLAIN = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
# Beams run until all are finished, so each of these has an end that texts meet.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with an eos": {"eos_token_id": [*range(20, 32)]},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [*range(20, 32)]},
}


def first(model: Any, ids: Any = IDS, mask: Any = MASK, **kwargs: Any) -> Any:
    return jaxgen.generate(model, ids, attention_mask=mask, return_dict_in_generate=True, **{**PLAIN, **kwargs})


def longer(mask: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(mask, ((0, 0), (0, columns)), constant_values=1)


def torch_ids(ids: np.ndarray) -> Any:
    import torch

    return torch.tensor(ids)


def tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(each) if isinstance(each, np.ndarray) else each for name, each in arrays.items()}


@pytest.mark.parametrize("new_only", [False, True], ids=["the whole text", "new ids and the whole mask"])
def test_a_call_that_goes_on_from_a_cache_gives_the_tokens_of_one_long_call(model: Any, new_only: bool) -> None:
    whole = first(model, max_new_tokens=2 * NEW).sequences
    start = first(model)
    ids, mask = start.sequences, longer(MASK, NEW)
    assert start.cache.get_seq_length() == COLUMNS + NEW - 1
    rest = first(model, ids[:, -1:] if new_only else ids, mask, cache=start.cache)
    np.testing.assert_array_equal(rest.sequences, whole[:, COLUMNS + NEW - 1 :] if new_only else whole)
    again = first(model, ids, mask, cache=start.cache)
    np.testing.assert_array_equal(again.sequences, whole)  # the cache given is not used up


def test_a_cache_that_goes_on_can_go_on_again(model: Any) -> None:
    out = first(model, max_new_tokens=2)
    for turn in (1, 2, 3):
        past = out.cache
        out = first(model, out.sequences, longer(MASK, 2 * turn), cache=past, max_new_tokens=2)
    np.testing.assert_array_equal(out.sequences, first(model, max_new_tokens=8).sequences)


# ---- Caches of torch ----


@pytest.mark.oracle
@pytest.mark.parametrize("new_only", [False, True], ids=["the whole text", "new ids and the whole mask"])
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_a_cache_that_torch_filled_goes_on_as_in_torch(model: Any, twin: Any, kind: str, new_only: bool) -> None:
    arguments = {**PLAIN, **KINDS[kind]}
    beams = arguments.get("num_beams", 1)

    def filled(copies: int) -> Any:
        prompts = {"input_ids": IDS.repeat(copies, 0), "attention_mask": MASK.repeat(copies, 0)}
        return twin.generate(**tensors(prompts), **PLAIN, return_dict_in_generate=True)

    start = filled(1)
    ids, mask = start.sequences.numpy(), longer(MASK, NEW)
    seen = start.past_key_values.get_seq_length()
    given = {"input_ids": ids[:, seen:] if new_only else ids, "attention_mask": mask}
    before = start.past_key_values.layers[0].keys.clone()
    got = jaxgen.generate(model, **given, cache=start.past_key_values, **arguments)
    assert (before == start.past_key_values.layers[0].keys).all()
    # Of beams transformers wants the rows repeated.
    expected = twin.generate(**tensors(given), past_key_values=filled(beams).past_key_values, **arguments)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_empty_cache_of_torch_is_none_and_a_static_one_is_read_as_far_as_it_is_filled(
    kind: str, model: Any, twin: Any
) -> None:
    import transformers

    cache = transformers.DynamicCache()
    if kind == "static":
        cache = transformers.StaticCache(config=twin.config, max_cache_len=COLUMNS + 2 * NEW)
    expected = first(model, max_new_tokens=2 * NEW).sequences
    np.testing.assert_array_equal(first(model, cache=cache, max_new_tokens=2 * NEW).sequences, expected)
    start = twin.generate(**tensors({"input_ids": IDS, "attention_mask": MASK}), past_key_values=cache, **PLAIN)
    np.testing.assert_array_equal(first(model, start.numpy(), longer(MASK, NEW), cache=cache).sequences, expected)


@pytest.mark.oracle
def test_caches_of_torch_that_do_not_fit_are_refused(model: Any, twin: Any, bundled: Any) -> None:
    import torch
    import transformers

    filled = twin.generate(torch.tensor(IDS[:1]), return_dict_in_generate=True, **PLAIN).past_key_values
    with pytest.raises(ValueError, match="`cache` belongs to another model"):
        jaxgen.generate(bundled, IDS, cache=filled, **PLAIN)
    half = transformers.DynamicCache()
    for layer, (keys, values) in enumerate((each.keys, each.values) for each in filled.layers):
        half.update(keys.bfloat16(), values.bfloat16(), layer)
    with pytest.raises(ValueError, match="`cache` belongs to another model"):
        jaxgen.generate(model, IDS, cache=half, **PLAIN)
    with pytest.raises(ValueError, match="`cache` is of type EncoderDecoderCache"):
        both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        jaxgen.generate(model, IDS, cache=both, **PLAIN)


# ---- The two names of the cache ----


def test_the_cache_goes_in_and_comes_out_under_both_names(model: Any) -> None:
    start = first(model, max_new_tokens=2)
    assert start.cache is start.past_key_values is start["cache"] is start["past_key_values"]
    assert "cache" in start and "past_key_values" in start and lazy.cache_name() in list(start)
    arguments = {"ids": start.sequences, "mask": longer(MASK, 2), "max_new_tokens": 2}
    expected = first(model, **arguments, cache=start.cache).sequences
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        got = first(model, **arguments, past_key_values=start.cache).sequences
    np.testing.assert_array_equal(got, expected)


def test_given_under_both_names_the_newer_wins_with_a_warning(model: Any) -> None:
    """An old cache of another model would be refused if anything read it."""
    start = first(model, max_new_tokens=2)
    with pytest.warns(FutureWarning, match="Both `past_key_values` and `cache` are set for `generate`. Using `cache="):
        first(model, start.sequences, longer(MASK, 2), cache=start.cache, past_key_values=object(), max_new_tokens=2)


@pytest.mark.oracle
def test_the_older_name_warns_where_transformers_does(model: Any, twin: Any) -> None:
    import torch

    def said(generate: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(past_key_values=None, max_new_tokens=1)
        texts = [str(each.message) for each in caught if each.category is FutureWarning]
        return [text.replace("LlamaForCausalLM.", "") for text in texts]

    ours = said(lambda **kwargs: jaxgen.generate(model, IDS[:1], **kwargs))
    assert ours == said(lambda **kwargs: twin.generate(torch.tensor(IDS[:1]), **kwargs))


@pytest.mark.oracle
@pytest.mark.parametrize("new_only", [False, True], ids=["the whole text", "new ids and the whole mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_turns_on_a_cache_equal_transformers(model: Any, twin: Any, kind: str, new_only: bool) -> None:
    arguments = {**PLAIN, **KINDS[kind]}
    said = RNG.integers(3, 97, (ROWS, 4))
    if new_only and "repetition_penalty" in arguments:
        mask, prompts = np.ones_like(MASK), np.where(MASK, IDS, 5)  # transformers' penalty misplaces padding here
    else:
        mask, prompts = MASK, IDS
    start = first(model, prompts, mask)
    ids, mask = np.concatenate([start.sequences, said], axis=1), longer(mask, NEW + said.shape[1])
    seen = start.cache.get_seq_length()
    # A cache of as many rows as there are beams is what transformers asks for.
    expanded = {"input_ids": prompts, "attention_mask": mask[:, :COLUMNS]}
    expanded = {name: np.repeat(each, arguments.get("num_beams", 1), axis=0) for name, each in expanded.items()}
    theirs = twin.generate(**tensors(expanded), **PLAIN, return_dict_in_generate=True)
    given = {"input_ids": ids[:, seen:] if new_only else ids, "attention_mask": mask}
    expected = twin.generate(**tensors(given), past_key_values=theirs.past_key_values, **arguments)
    got = jaxgen.generate(model, **given, cache=start.cache, **arguments)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
def test_every_output_of_a_continued_call_equals_transformers(folder: Path, model: Any) -> None:
    twin = torch_model(folder)
    twin.set_attn_implementation("eager")
    flags = dict.fromkeys(["output_scores", "output_logits", "output_attentions", "output_hidden_states"], True)
    start = first(model)
    ids, mask = np.concatenate([start.sequences, IDS[:, -3:]], axis=1), longer(MASK, NEW + 3)
    ids = np.where(ids == 0, 5, ids)
    ids[:, :COLUMNS] = IDS
    past = twin.generate(
        **tensors({"input_ids": IDS, "attention_mask": MASK}), **PLAIN, return_dict_in_generate=True
    ).past_key_values
    theirs = twin.generate(
        **tensors({"input_ids": ids, "attention_mask": mask}),
        past_key_values=past, return_dict_in_generate=True, **flags, **PLAIN,
    )  # fmt: skip
    ours = first(model, ids, mask, cache=start.cache, **flags)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    for name in ("attentions", "hidden_states"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            for layer, expected in zip(mine, other, strict=True):
                np.testing.assert_allclose(layer, expected.numpy(), atol=1e-4)
    for (keys, values), layer in zip(ours.cache, theirs.past_key_values.layers, strict=True):
        for mine, expected in ((keys, layer.keys), (values, layer.values)):
            assert mine.shape == expected.shape
            np.testing.assert_allclose(mine[:, :, 5:], expected.numpy()[:, :, 5:], atol=1e-4)


def test_one_prefix_serves_every_prompt_and_its_columns_are_read_once(model: Any) -> None:
    prefix = RNG.integers(3, 97, (1, 33))
    cache = first(model, prefix, None, max_new_tokens=1).cache
    assert cache.get_seq_length() == 33 and cache.batch_size == 1
    whole = np.concatenate([np.repeat(prefix, ROWS, axis=0), IDS], axis=1)
    mask = np.pad(MASK, ((0, 0), (33, 0)), constant_values=1)
    for kind in ({}, KINDS["beams"]):
        arguments = {**PLAIN, **kind}
        expected = jaxgen.generate(model, whole, attention_mask=mask, **arguments)
        got = jaxgen.generate(model, whole, attention_mask=mask, cache=cache, **arguments)
        np.testing.assert_array_equal(got, expected)
    drawn = {"do_sample": True, "key": 3, "num_return_sequences": 2, **PLAIN}
    np.testing.assert_array_equal(
        jaxgen.generate(model, whole, attention_mask=mask, cache=cache, **drawn),
        jaxgen.generate(model, whole, attention_mask=mask, **drawn),
    )


def test_a_prefix_of_240_columns_saves_most_of_the_prefill_of_16_prompts(model: Any) -> None:
    """So few columns that attention has no loop over blocks, whose body XLA would count once."""
    prefix, own = RNG.integers(3, 97, (1, 240)), RNG.integers(3, 97, (16, 8))
    cache = first(model, prefix, None, max_new_tokens=1).cache
    whole = np.concatenate([np.repeat(prefix, 16, axis=0), own], axis=1)

    def flops(**kwargs: Any) -> float:
        program = loop.prefill.lower(model, jaxgen.prepare(model, whole, **PLAIN, **kwargs))
        return program.compile().cost_analysis()["flops"]

    once = loop.prefill.lower(model, jaxgen.prepare(model, prefix, **PLAIN)).compile()
    assert flops() / (once.cost_analysis()["flops"] + flops(cache=cache)) > 5


def test_a_cache_can_be_cropped_and_go_on_elsewhere(model: Any) -> None:
    start = first(model)
    past = start.cache
    other = np.concatenate([start.sequences[:, : COLUMNS + 2], IDS[:, -2:]], axis=1)
    mask = longer(MASK, 4)
    past.crop(COLUMNS + 2 - past.get_seq_length())
    got = first(model, other, mask, cache=past)
    np.testing.assert_array_equal(got.sequences, first(model, other, mask).sequences)
    past.crop(-2)
    past.crop(0)
    assert past.get_seq_length() == COLUMNS and past[0][0].shape[2] == COLUMNS and len(past[:1]) == 1
    for wrong in (1, -COLUMNS - 1, None, -1.5, True):
        with pytest.raises(ValueError, match=r"`crop` takes minus the number of tokens to remove from the \d+ tokens"):
            past.crop(wrong)


def test_a_cache_of_beams_goes_on_beam_by_beam(model: Any) -> None:
    start = first(model, **KINDS["beams"])
    past = start.cache
    assert past.batch_size == ROWS * 3
    past.crop(COLUMNS - past.get_seq_length())  # to what the beams share, so that it is known
    ids, mask = np.repeat(np.append(IDS, IDS[:, -1:], axis=1), 3, axis=0), np.repeat(longer(MASK, 1), 3, axis=0)
    got = first(model, ids, mask, cache=past)
    np.testing.assert_array_equal(got.sequences, first(model, ids, mask).sequences)


def test_other_numbers_on_a_cache_compile_nothing(model: Any) -> None:
    start = first(model)
    mask = longer(MASK, NEW)
    first(model, start.sequences, mask, cache=start.cache)
    before = jaxgen.compile_counts()
    shorter = first(model, max_new_tokens=NEW - 2)
    first(model, shorter.sequences, mask[:, :-2], cache=shorter.cache)
    assert jaxgen.compile_counts() == before


def test_the_sizes_of_a_cache_that_goes_on_are_rounded_as_a_whole(model: Any) -> None:
    """So that calls of other lengths share their programs: a sum of buckets would be a size of its own."""
    whole = first(model, RNG.integers(3, 97, (1, 700)), None, max_new_tokens=1)
    for seen, fresh, new_tokens in itertools.product((270, 300, 650), (1, 20, 50), (5, 40, 300)):
        past = copy.copy(whole.past_key_values)
        past.crop(seen - past.get_seq_length())
        arguments = {**PLAIN, "max_new_tokens": new_tokens, "past_key_values": past}
        call = prepared(model, whole.sequences[:, : seen + fresh], **arguments)
        sizes = [call.call.prompt_slots, call.call.slots, *(each.slots for each in cache_sizes(call, weights=0))]
        assert sizes == [bucket(size) for size in sizes]
        assert call.call.prompt_slots >= seen + fresh and sizes[-1] >= seen + fresh + new_tokens - 1


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "beside their ids"])
def test_embeddings_in_place_of_tokens_equal_transformers(model: Any, twin: Any, kind: str, with_ids: bool) -> None:
    arguments = {**PLAIN, **KINDS[kind]}
    # Of embeddings alone, transformers leaves as many new tokens out of the penalty as there is padding.
    mask = MASK if with_ids or "repetition_penalty" not in arguments else np.ones_like(MASK)
    embeddings = np.asarray(model.embed_tokens(IDS)) + RNG.normal(size=(ROWS, COLUMNS, 32)).astype(np.float32) / 4
    given = {"inputs_embeds": embeddings, "attention_mask": mask, **({"input_ids": IDS} if with_ids else {})}
    expected = twin.generate(**tensors(given), **arguments)
    got = jaxgen.generate(model, **given, **arguments)
    np.testing.assert_array_equal(got, expected)
    if kind == "greedy":
        assert got.shape[1] == NEW + (COLUMNS if with_ids else 0)


@pytest.mark.oracle
def test_embeddings_alone_have_the_lengths_and_the_warnings_of_transformers(model: Any, twin: Any) -> None:
    embeddings = np.asarray(model.embed_tokens(IDS))
    lengths = {"max_length": COLUMNS + 4, "min_length": COLUMNS + 2, "eos_token_id": [*range(3, 90)], "pad_token_id": 0}
    given = {"inputs_embeds": embeddings, "attention_mask": MASK, "encoder_repetition_penalty": 1.3}
    with pytest.warns(UserWarning, match="Passing `encoder_repetition_penalty` requires some form of `input_ids`"):
        expected = twin.generate(**tensors(given), **lengths)
    with pytest.warns(UserWarning, match="Passing `encoder_repetition_penalty` requires some form of `input_ids`"):
        got = jaxgen.generate(model, **given, **lengths)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
def test_embeddings_come_as_torch_made_them_and_keep_their_outputs_without_a_cache(model: Any, twin: Any) -> None:
    embeddings = twin.get_input_embeddings()(torch_ids(IDS))
    whole = jaxgen.generate(model, IDS, attention_mask=MASK, **PLAIN)[:, COLUMNS:]
    np.testing.assert_array_equal(jaxgen.generate(model, inputs_embeds=embeddings, attention_mask=MASK, **PLAIN), whole)
    out = first(model, None, inputs_embeds=embeddings.bfloat16(), use_cache=False, output_hidden_states=True)
    assert out.cache is not None and out.hidden_states[0][0].shape == (ROWS, COLUMNS, 32)


def test_embeddings_of_the_tokens_give_the_tokens_continuation_and_go_on_from_a_cache(model: Any) -> None:
    whole = first(model)
    embeddings = np.asarray(model.embed_tokens(IDS))
    alone = first(model, None, MASK, inputs_embeds=embeddings)
    np.testing.assert_array_equal(alone.sequences, whole.sequences[:, COLUMNS:])
    assert alone.cache.get_seq_length() == COLUMNS + NEW - 1
    longer_embeddings = np.concatenate([embeddings, model.embed_tokens(alone.sequences)], axis=1)
    rest = first(model, None, longer(MASK, NEW), inputs_embeds=longer_embeddings, cache=alone.cache)
    np.testing.assert_array_equal(rest.sequences, first(model, max_new_tokens=2 * NEW).sequences[:, COLUMNS + NEW :])


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_the_callers_own_equal_transformers(model: Any, twin: Any, kind: str) -> None:
    positions = np.cumsum(RNG.integers(1, 5, (ROWS, COLUMNS)), axis=1)
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    arguments = {**PLAIN, **KINDS[kind]}
    expected = twin.generate(**tensors(given), **arguments)
    np.testing.assert_array_equal(jaxgen.generate(model, **given, **arguments), expected)
    assert not np.array_equal(expected, jaxgen.generate(model, IDS, attention_mask=MASK, **arguments))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["greedy with an eos", "beams"])
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(model: Any, twin: Any, chunk: int, kind: str) -> None:
    arguments = {**PLAIN, **KINDS[kind]}
    expected = twin.generate(
        **tensors({"input_ids": IDS, "attention_mask": MASK}), prefill_chunk_size=chunk, **arguments
    )
    got = jaxgen.generate(model, IDS, attention_mask=MASK, prefill_chunk_size=chunk, **arguments)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("number", [5, 10], ids=["dynamic", "longrope"])
def test_chunks_are_cut_where_transformers_cuts_them(number: int, tmp_path: Path) -> None:
    """Which shows in ropes that choose their frequencies by the largest position of a forward pass."""
    whole = architecture(number)
    folder = replace(whole, config={**whole.config, "num_hidden_layers": 1}).write(tmp_path)
    ids = np.random.default_rng(188).integers(3, 97, (2, 47))
    expected = torch_model(folder).generate(torch_ids(ids), prefill_chunk_size=4, **PLAIN)
    np.testing.assert_array_equal(jaxgen.generate(jaxgen.load(folder), ids, prefill_chunk_size=4, **PLAIN), expected)


def test_other_lengths_in_a_bucket_of_chunks_compile_nothing(model: Any) -> None:
    lengths = [np.full((1, columns), 5) for columns in (21, 22, 24)]
    jaxgen.generate(model, lengths[0], prefill_chunk_size=4, **PLAIN)
    before = jaxgen.compile_counts()
    for ids in lengths[1:]:
        jaxgen.generate(model, ids, prefill_chunk_size=4, **PLAIN)
    assert jaxgen.compile_counts() == before


@pytest.mark.oracle
def test_chunks_on_a_cache_with_every_output_equal_transformers(folder: Path, model: Any) -> None:
    twin = torch_model(folder)
    twin.set_attn_implementation("eager")
    flags = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    given = {"input_ids": IDS, "attention_mask": MASK}
    theirs = twin.generate(**tensors(given), prefill_chunk_size=4, **flags, **PLAIN)
    ours = jaxgen.generate(model, **given, prefill_chunk_size=4, **flags, **PLAIN)
    for name in ("attentions", "hidden_states"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            for layer, expected in zip(mine, other, strict=True):
                assert layer.shape == expected.shape
                np.testing.assert_allclose(layer, expected.numpy(), atol=1e-4)
    start = first(model)
    whole = np.concatenate([start.sequences, IDS], axis=1), np.concatenate([longer(MASK, NEW), MASK], axis=1)
    got = first(model, *whole, cache=start.cache, prefill_chunk_size=4)
    np.testing.assert_array_equal(got.sequences, first(model, *whole).sequences)


def test_chunks_bound_the_memory_of_a_long_prompt(model: Any) -> None:
    prompt = RNG.integers(3, 97, (2, 8192))

    def temporaries(**kwargs: Any) -> int:
        program = loop.prefill.lower(model, jaxgen.prepare(model, prompt, **PLAIN, **kwargs))
        return program.compile().memory_analysis().temp_size_in_bytes

    whole = temporaries()
    assert temporaries(prefill_chunk_size=128) < 0.8 * whole
    # At once, only some columns' scores are in memory; those of all would be 2 rows of 4 heads or more.
    assert whole < 4 * 2 * 4 * 8192**2


def test_a_continued_call_streams_and_is_a_pure_function_too(model: Any) -> None:
    start = first(model)
    arguments = {"attention_mask": longer(MASK, NEW), "cache": start.cache, **PLAIN}
    expected = jaxgen.generate(model, start.sequences, **arguments)
    chunks = list(jaxgen.stream(model, start.sequences, **arguments))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected[:, COLUMNS + NEW :])
    call = jaxgen.prepare(model, start.sequences, **arguments)
    out = jax.jit(jaxgen.decode)(model, call)
    np.testing.assert_array_equal(out["sequences"][:ROWS, : out["length"]], expected)


def test_a_streamer_of_embeddings_gets_an_empty_prompt(model: Any) -> None:
    class Seen:
        def __init__(self) -> None:
            self.shapes: list[Any] = []

        def put(self, value: Any) -> None:
            self.shapes.append(value.shape)

        def end(self) -> None:
            self.shapes.append("end")

    streamer = Seen()
    jaxgen.generate(model, inputs_embeds=np.asarray(model.embed_tokens(IDS)), streamer=streamer, **PLAIN)
    assert streamer.shapes == [(ROWS, 0), *[(ROWS,)] * NEW, "end"]


PACKED = {"position_ids": [[0, 1, 2] * 3], "attention_mask": np.ones_like(MASK), "use_cache": False}
EMPTY = {"input_ids": np.zeros((2, 0), int), "inputs_embeds": np.ones((3, 2, 32))}
EMBEDDINGS = np.ones((ROWS, COLUMNS, 32), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a cache of something else": ({"cache": object()}, "is of type object, but must be"),
    "a legacy cache": ({"cache": ((1, 2),)}, "is of type tuple"),
    "embeddings of another size": ({"inputs_embeds": EMBEDDINGS[..., :5]}, r"must be \[prompts, columns, 32\]"),
    "embeddings that are ids": ({"inputs_embeds": EMBEDDINGS.astype(int)}, "has dtype int64, but must be floating"),
    "embeddings of other rows": ({"inputs_embeds": EMBEDDINGS[:2]}, "`inputs_embeds` has 2 rows"),
    "embeddings of other columns": ({"inputs_embeds": EMBEDDINGS[:, :4]}, "the `attention_mask` of `inputs_embeds`"),
    "too few positions": ({"position_ids": MASK[:, :3]}, r"`position_ids` has shape \(3, 3\), but 3 prompts have 9"),
    "ids of other rows": (EMPTY, "`inputs_embeds` has 3 rows, but `input_ids` has 2"),
    "ragged embeddings": ({"inputs_embeds": [[[1.0] * 32], [[1.0] * 32] * 2]}, "`inputs_embeds` is not a rectangular"),
    "positions beyond integers": ({"position_ids": MASK - 2**62}, "`position_ids` holds -46116860184273"),
    "text for a tokenizer": ({"token_healing": True, "tokenizer": "x"}, "must be a transformers tokenizer, but is 'x'"),
    "positions of floats": ({"position_ids": MASK * 1.0}, "`position_ids` has dtype float64"),
    "no columns in a chunk": ({"prefill_chunk_size": 0}, "`prefill_chunk_size`=0 must be at least 1"),
    "chunks without a cache": ({"prefill_chunk_size": 2, "use_cache": False}, "Cannot use prefill chunking without a"),
    "packed texts": (PACKED, "several texts packed into a row"),
    "chunks and guidance": (
        {"prefill_chunk_size": 2, "guidance_scale": 2.0},
        "cannot be combined with `guidance_scale`",
    ),
    "positions and contrast": (
        {"position_ids": MASK, "penalty_alpha": 0.5, "top_k": 3},
        "cannot be combined with `penalty_",
    ),
    "healing without a tokenizer": ({"token_healing": True}, "When generating with token healing, you must pass"),
    "healing at positions": ({"token_healing": True, "tokenizer": print, "position_ids": MASK}, "changes the prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_before_anything_is_compiled(model: Any, case: str) -> None:
    arguments, message = REFUSED[case]
    before = jaxgen.compile_counts()
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, **{**PLAIN, "input_ids": IDS, **arguments})
    assert jaxgen.compile_counts() == before


def test_a_cache_that_does_not_fit_is_refused(model: Any, bundled: Any) -> None:
    start = first(model)
    past = start.cache
    with pytest.raises(ValueError, match="`cache` has 3 rows, but there are 2 prompts"):
        jaxgen.generate(model, start.sequences[:2], cache=past, **PLAIN)
    with pytest.raises(ValueError, match="holds 14 tokens, and the prompt has 1, so there is no new token to read"):
        jaxgen.generate(model, start.sequences[:, -1:], cache=past, **PLAIN)
    with pytest.raises(ValueError, match="`cache` belongs to another model"):
        jaxgen.generate(bundled, start.sequences, cache=past, **PLAIN)
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        jaxgen.generate(model, start.sequences, cache=past, cache_implementation="static", **PLAIN)

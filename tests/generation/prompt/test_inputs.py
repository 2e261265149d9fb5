"""What a caller passes, and the arrays it becomes: prompts, masks, positions, embeddings, caches and keys."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GenerationConfig

from jaxgen.generation.config.decode_config import DecodeConfig
from jaxgen.generation.config.resolve import resolve
from jaxgen.generation.prompt.inputs import (
    Inputs,
    checked_inputs,
    checked_negatives,
    counted_positions,
    infer_attention_mask,
    key_data,
    refuse_tracer,
)
from jaxgen.generation.prompt.past_key_values import PastKeyValues
from jaxgen.kv_cache import KVCache

VOCAB, HIDDEN = 97, 4
MODEL: Any = SimpleNamespace(vocab_size=VOCAB, hidden_size=HIDDEN)
IDS = np.array([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
EMBEDDINGS = np.arange(32, dtype=np.float32).reshape(2, 4, HIDDEN)


def config(**fields: Any) -> DecodeConfig:
    return resolve(GenerationConfig(), None, fields)[0]


def read(inputs: Any = None, fields: Any = None, **model_inputs: Any) -> Inputs:
    return checked_inputs(MODEL, inputs, model_inputs, config(**(fields or {})))


def cache(rows: int, columns: int) -> PastKeyValues:
    slots = np.broadcast_to(np.arange(columns), (rows, 1, columns))
    return PastKeyValues(KVCache.zeros(1, rows, columns, 1, 2, np.float32), slots)


def longer(mask: np.ndarray, columns: int) -> np.ndarray:
    """With so many columns in front."""
    return np.pad(mask, ((0, 0), (columns, 0)), constant_values=1)


# ---- Prompts ----

PROMPTS: dict[str, Any] = {
    "lists": IDS.tolist(),
    "tuples": tuple(map(tuple, IDS.tolist())),
    "int64": IDS,
    "uint8": IDS.astype(np.uint8),
    "arrays of JAX": jnp.asarray(IDS),
    "a list of arrays": list(IDS),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_of_any_kind_becomes_ids_and_masks_under_either_name(kind: str) -> None:
    for found in (read(PROMPTS[kind]), read(input_ids=PROMPTS[kind])):
        assert (found.input_ids.dtype, found.attention_mask.dtype, found.text_mask.dtype) == (np.int32, bool, bool)
        np.testing.assert_array_equal(found.input_ids, IDS)
        np.testing.assert_array_equal(found.attention_mask, np.ones_like(IDS))
        np.testing.assert_array_equal(found.text_mask, np.ones_like(IDS))
        assert (found.num_new, found.position_ids, found.embeddings, found.past) == (4, None, None, None)
        assert found.plain


@pytest.mark.oracle
def test_tensors_are_taken_as_arrays_are() -> None:
    import torch

    found = read(torch.tensor(IDS), attention_mask=torch.tensor(MASK), position_ids=torch.tensor(IDS))
    for mine, expected in ((found.input_ids, IDS), (found.attention_mask, MASK), (found.position_ids, IDS)):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_array_equal(mine, expected)
    embeddings = torch.tensor(EMBEDDINGS, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(read(inputs_embeds=embeddings).embeddings, EMBEDDINGS)


def test_the_largest_and_the_smallest_id_of_a_model_are_ids() -> None:
    assert read([[0, VOCAB - 1]]).input_ids.tolist() == [[0, 96]]


def test_without_a_prompt_there_is_a_bos_for_each_row_of_the_mask() -> None:
    assert read(fields={"bos_token_id": 1}).input_ids.tolist() == [[1]]
    found = read(fields={"bos_token_id": 1}, attention_mask=np.ones((3, 1)))
    assert found.input_ids.tolist() == [[1], [1], [1]] and found.attention_mask.shape == (3, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array([["Once", "upon"]]), "`input_ids` is text .'Once'"),
        (np.array([["Once"]], object), "`input_ids` is text .'Once'"),
        (b"Once", "`input_ids` is text .b'Once'"),
        ([[True, False]], "`input_ids` has dtype bool"),
        ([[5, VOCAB], [-1, 5]], "`input_ids` holds -1"),
        ([[5, VOCAB]], "`input_ids` holds 97, but ids of this model are 0 to 96"),
        ([[5, 2**40]], f"`input_ids` holds {2**40}"),
        ([[], []], r"`input_ids` has shape \(2, 0\), but every prompt needs at least one token"),
    ],
    ids=[
        "an array of texts",
        "an array of objects",
        "bytes",
        "bools",
        "two odd ids",
        "the next id",
        "a large id",
        "no ids",
    ],
)
def test_what_is_no_prompt_is_refused_with_what_it_holds(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(given)


# ---- Masks and positions ----


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32], ids=lambda dtype: dtype.__name__)
def test_a_mask_of_zeros_and_ones_is_a_mask_of_bools(dtype: type) -> None:
    found = read(IDS, attention_mask=MASK.astype(dtype), fields={"pad_token_id": 11})
    for mask in (found.attention_mask, found.text_mask):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, MASK)
    assert found.plain


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0.5, 1, 1, 1], [1] * 4], "`attention_mask` holds 0.5, but must hold 0 and 1"),
        ([[-1, 1, 1, 1], [1] * 4], "`attention_mask` holds -1"),
        (MASK[:1], r"`attention_mask` has shape \(1, 4\), but its ids have \(2, 4\)"),
        (MASK[:, :3], r"`attention_mask` has shape \(2, 3\)"),
        (MASK[0], r"`attention_mask` has shape \(4,\)"),
        (np.ones((2, 1, 4, 4)), "`attention_mask` passed to `generate` must be 2D, but has 4 dimensions"),
        ([[1] * 4, [1] * 3], "`attention_mask` is not a rectangular array"),
        (3, r"`attention_mask` has shape \(\), but must be \[prompts, tokens\]"),
    ],
    ids=["a half", "minus one", "too few rows", "too few columns", "one row", "four dimensions", "ragged", "a number"],
)
def test_what_is_no_mask_of_the_prompt_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(IDS, attention_mask=mask)


@pytest.mark.oracle
@pytest.mark.parametrize("eos", [None, 0, [2, 0], [2, 3]], ids=str)
@pytest.mark.parametrize("pad", [None, 0, 50], ids=str)
def test_pads_are_padding_where_transformers_takes_them_for_it(pad: int | None, eos: Any) -> None:
    import torch
    from transformers import GenerationMixin

    ids = np.array([[0, 0, 5, 2], [7, 0, 8, 0]])
    theirs = GenerationConfig(pad_token_id=pad, eos_token_id=eos)
    tensors = {"_pad_token_tensor": pad, "_eos_token_tensor": [eos] if isinstance(eos, int) else eos}
    for name, value in tensors.items():
        setattr(theirs, name, None if value is None else torch.tensor(value))
    method: Any = GenerationMixin._prepare_attention_mask_for_generation
    expected = method(None, torch.tensor(ids), theirs, {})
    ours = config(pad_token_id=pad, eos_token_id=eos)
    np.testing.assert_array_equal(infer_attention_mask(ids, ours), expected)
    np.testing.assert_array_equal(read(ids, {"pad_token_id": pad, "eos_token_id": eos}).attention_mask, expected)


@pytest.mark.oracle
def test_positions_are_counted_as_in_transformers() -> None:
    import torch
    from transformers import GenerationMixin

    masks = np.random.default_rng(0).random((20, 9)) < 0.6
    method: Any = GenerationMixin._prepare_position_ids_for_generation
    expected = method(None, torch.tensor(masks), {"attention_mask": torch.tensor(masks)})
    found = counted_positions(masks)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_positions_count_unmasked_columns_and_are_zero_elsewhere() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]], bool)
    assert counted_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 0, 2], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IDS, IDS),
        (IDS[:1], IDS[[0, 0]]),
        (np.concatenate([IDS[:, ::-1], IDS], axis=1), IDS),
        ([[-(2**30), 0, 0, 2**30 - 1]], [[-(2**30), 0, 0, 2**30 - 1]] * 2),
    ],
    ids=["for each column", "one row for all", "of columns before them too", "the largest"],
)
def test_positions_are_those_of_the_columns_to_be_read(given: Any, expected: Any) -> None:
    found = read(IDS, position_ids=given)
    assert found.position_ids is not None and found.position_ids.dtype == np.int32
    np.testing.assert_array_equal(found.position_ids, expected)
    assert not found.plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 4), int), r"`position_ids` has shape \(3, 4\), but 2 prompts have 4 new tokens"),
        ([[0, 1, 2, 2**30]], f"`position_ids` holds {2**30}, but may hold"),
        ([[0, 1, 2, -(2**30) - 1]], f"`position_ids` holds {-(2**30) - 1}, but may hold"),
        (np.zeros((2, 4, 1), int), r"`position_ids` has shape \(2, 4, 1\)"),
    ],
    ids=["other rows", "too large", "too small", "three dimensions"],
)
def test_positions_of_another_shape_or_size_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(IDS, position_ids=given)


# ---- Caches ----


@pytest.mark.parametrize("rows", [1, 2], ids=["one row for all prompts", "a row for each"])
def test_behind_a_cache_the_ids_are_the_whole_text_or_the_new_ones(rows: int) -> None:
    past = cache(rows, 3)
    whole = read(IDS, cache=past)
    assert (whole.num_new, whole.past) == (1, past) and not whole.plain
    assert whole.attention_mask.shape == whole.text_mask.shape == (2, 4)
    masked = read(IDS, cache=past, attention_mask=MASK)
    assert masked.num_new == 1
    np.testing.assert_array_equal(masked.attention_mask, MASK)
    mask = longer(MASK, 3)
    new = read(IDS, cache=past, attention_mask=mask)
    assert new.num_new == 4
    np.testing.assert_array_equal(new.attention_mask, mask)
    np.testing.assert_array_equal(new.text_mask, MASK)


def test_positions_behind_a_cache_may_be_those_of_the_whole_text() -> None:
    found = read(IDS, cache=cache(2, 3), position_ids=[[0, 1, 2, 30], [0, 1, 2, 40]]).position_ids
    assert found is not None and found.tolist() == [[30], [40]]
    with pytest.raises(ValueError, match=r"`position_ids` has shape \(2, 1\), but 2 prompts have 4 new tokens"):
        read(IDS, cache=cache(2, 3), attention_mask=longer(MASK, 3), position_ids=[[30], [40]])


@pytest.mark.oracle
def test_a_filled_cache_of_torch_is_read_and_an_empty_one_is_none() -> None:
    import torch
    import transformers

    model: Any = SimpleNamespace(
        **vars(MODEL), make_cache=lambda rows, slots: KVCache.zeros(1, rows, slots, 1, 2, np.float32)
    )
    past = transformers.DynamicCache()
    assert checked_inputs(model, IDS, {"cache": past}, config()).past is None
    past.update(torch.ones(2, 1, 3, 2), torch.zeros(2, 1, 3, 2), 0)
    found = checked_inputs(model, IDS, {"cache": past}, config())
    assert found.past is not None and (found.num_new, found.past.get_seq_length()) == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": cache(3, 3)}, "`cache` has 3 rows, but there are 2 prompts"),
        ({"cache": cache(2, 4)}, "`cache` holds 4 tokens, and the prompt has 4, so there is no new token to read"),
        ({"cache": cache(1, 9)}, "`cache` holds 9 tokens, and the prompt has 4"),
        (
            {"cache": cache(2, 3), "attention_mask": longer(MASK, 2)},
            r"`attention_mask` has shape \(2, 6\), but its ids have \(2, 4\)",
        ),
    ],
    ids=["other rows", "as many columns", "more columns", "a mask between the two"],
)
def test_a_cache_that_does_not_go_with_the_prompt_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(IDS, **arguments)


# ---- Embeddings ----


def test_embeddings_alone_are_a_prompt_without_text() -> None:
    for found in (read(inputs_embeds=EMBEDDINGS), read(np.zeros((2, 0), int), inputs_embeds=EMBEDDINGS.tolist())):
        assert (found.input_ids.shape, found.text_mask.shape) == ((2, 0), (2, 0))
        np.testing.assert_array_equal(found.embeddings, EMBEDDINGS)
        np.testing.assert_array_equal(found.attention_mask, np.ones((2, 4)))
        assert found.num_new == 4 and not found.plain


def test_embeddings_beside_ids_of_other_columns_have_a_mask_of_their_own() -> None:
    same = read(IDS, inputs_embeds=EMBEDDINGS, attention_mask=MASK)
    np.testing.assert_array_equal(same.text_mask, MASK)
    np.testing.assert_array_equal(same.attention_mask, MASK)
    fewer = read(IDS[:, :2], inputs_embeds=EMBEDDINGS, attention_mask=MASK)
    np.testing.assert_array_equal(fewer.text_mask, np.ones((2, 2)))
    np.testing.assert_array_equal(fewer.attention_mask, MASK)
    np.testing.assert_array_equal(fewer.input_ids, IDS[:, :2])


def test_behind_a_cache_the_embeddings_are_of_the_whole_text_and_the_new_ones_are_read() -> None:
    found = read(inputs_embeds=EMBEDDINGS, cache=cache(2, 3))
    assert found.num_new == 1
    np.testing.assert_array_equal(found.embeddings, EMBEDDINGS[:, 3:])


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (EMBEDDINGS[0], r"`inputs_embeds` has shape \(4, 4\), but must be \[prompts, columns, 4\]"),
        (EMBEDDINGS[:, :0], r"`inputs_embeds` has shape \(2, 0, 4\)"),
        (EMBEDDINGS[:0], r"`inputs_embeds` has shape \(0, 4, 4\)"),
        (EMBEDDINGS > 3, "`inputs_embeds` has dtype bool, but must be floating"),
    ],
    ids=["one prompt", "no columns", "no prompts", "bools"],
)
def test_what_is_no_embedding_of_the_prompts_is_refused(embeddings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(inputs_embeds=embeddings)


@pytest.mark.parametrize("kept", [None, 0, 3, np.int64(1)], ids=repr)
def test_a_number_of_logits_to_keep_changes_nothing(kept: Any) -> None:
    assert read(IDS, logits_to_keep=kept).plain


@pytest.mark.parametrize("kept", [True, 1.0, "1"], ids=repr)
def test_what_is_no_number_of_logits_is_refused(kept: Any) -> None:
    with pytest.raises(ValueError, match=f"`logits_to_keep`={kept!r} must be a number of tokens"):
        read(IDS, logits_to_keep=kept)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids", "inputs_embeds"])
def test_what_is_traced_is_refused_wherever_it_is_passed(name: str) -> None:
    arguments = {"input_ids": IDS, name: EMBEDDINGS if name == "inputs_embeds" else MASK}

    def traced(array: jax.Array) -> None:
        with pytest.raises(ValueError, match=r"run on the host, not inside jit.*Use `jaxgen\.decode`"):
            read(**{**arguments, name: array})

    jax.jit(traced)(arguments[name])
    refuse_tracer(arguments[name])  # an array is none


# ---- Padding and negative prompts ----


@pytest.mark.parametrize(("pad", "eos", "expected"), [(7, 2, 7), (0, 2, 0), (None, [5, 2], 5), (None, None, 0)])
def test_padding_is_the_pad_the_first_eos_or_nothing_that_shows(pad: Any, eos: Any, expected: int) -> None:
    assert config(pad_token_id=pad, eos_token_id=eos).fill_token_id == expected


def test_a_negative_prompt_is_the_last_token_unless_one_is_given() -> None:
    inputs = read(IDS, attention_mask=MASK)
    ids, mask = checked_negatives(MODEL, inputs, None, None)
    assert (ids.tolist(), mask.tolist()) == ([[7], [11]], [[True], [True]])
    ids, mask = checked_negatives(MODEL, inputs, IDS[::-1], None)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    assert (ids.tolist(), mask.tolist()) == (IDS[::-1].tolist(), [[True] * 4] * 2)
    np.testing.assert_array_equal(checked_negatives(MODEL, inputs, IDS, MASK)[1], MASK)
    with pytest.raises(ValueError, match=r"`negative_prompt_attention_mask` has shape \(2, 4\), .* have \(2, 1\)"):
        checked_negatives(MODEL, inputs, None, MASK)


# ---- Keys ----


def words(key: Any, rows: int = 2, padded_rows: int = 3, do_sample: bool = True) -> Any:
    return key_data(key, config(do_sample=do_sample), padded_rows, rows)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (7, [0, 7]),
        (np.int64(7), [0, 7]),
        (jnp.int32(7), [0, 7]),
        (2**32 + 5, [1, 5]),
        (2**64 - 1, [0xFFFFFFFF, 0xFFFFFFFF]),
        (2**64 + 7, [0, 7]),
        (-1, [0xFFFFFFFF, 0xFFFFFFFF]),
        (jax.random.key(7), [0, 7]),
        (jax.random.PRNGKey(7), [0, 7]),
        (np.array([3, 4], np.uint32), [3, 4]),
        (np.array([3, 4, 5, 6], np.uint32), [3, 4]),
        (jax.random.wrap_key_data(jnp.array([3, 4, 5, 6], jnp.uint32), impl="rbg"), [3, 4]),
    ],
    ids=repr,
)
def test_a_key_is_two_words(key: Any, expected: list[int]) -> None:
    found = words(key)
    assert found.dtype == np.uint32 and found.tolist() == expected


@pytest.mark.parametrize(
    "key",
    [
        [7, 2**32 + 8],
        np.array([7, 2**32 + 8]),
        np.array([[0, 7], [1, 8]], np.uint32),
        jax.random.wrap_key_data(jnp.array([[0, 7], [1, 8]], jnp.uint32)),
        np.array([[0, 7, 9, 9], [1, 8, 9, 9]], np.uint32),
    ],
    ids=["ints", "an array of ints", "old keys", "typed keys", "old keys of four words"],
)
def test_keys_of_each_prompt_get_zeros_for_the_rows_of_the_bucket(key: Any) -> None:
    found = words(key)
    assert found.dtype == np.uint32 and found.tolist() == [[0, 7], [1, 8], [0, 0]]


def test_two_small_numbers_are_a_key_for_each_of_two_prompts_and_none_for_one() -> None:
    assert words([3, 4]).tolist() == [[0, 3], [0, 4], [0, 0]]
    with pytest.raises(ValueError, match=r"`key` has shape \(2,\), but there are 1 prompts"):
        words([3, 4], rows=1)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("seven", "`key`='seven' is not a valid PRNG key"),
        (True, "`key`=True is not a valid PRNG key"),
        (0.5, "`key`=0.5 is not a valid PRNG key"),
        ([1, 2.0], r"`key`=\[1, 2.0\] is not a valid PRNG key"),
        ([[1], [2, 3]], r"`key`=\[\[1\], \[2, 3\]\] is not a valid PRNG key"),
        (jax.random.split(jax.random.key(0), 3), r"`key` has shape \(3,\), but there are 2 prompts"),
        (np.zeros((3, 2), np.uint32), r"`key` has shape \(3,\), but there are 2 prompts"),
        ([[1, 2], [3, 4]], r"`key` has shape \(2, 2\), but there are 2 prompts"),
    ],
    ids=[
        "text",
        "a flag",
        "a float",
        "an int and a float",
        "ragged",
        "three keys",
        "three old keys",
        "a table of ints",
    ],
)
def test_what_is_no_key_is_refused_with_its_value_or_its_shape(key: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words(key)


def test_without_a_key_the_words_are_fresh_and_greedy_decoding_has_none() -> None:
    found = [words(None) for _ in range(2)]
    assert all((each.shape, each.dtype) == ((2,), np.uint32) for each in found)
    assert found[0].tolist() != found[1].tolist()
    assert words(None, do_sample=False) is None and words(7, do_sample=False) is None

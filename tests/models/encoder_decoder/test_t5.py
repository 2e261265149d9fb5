"""T5 and its relatives: distances, what their files may say, and numbers as in transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_decoders import VOCAB, encoder_decoder, logits, pair, torch_generate, torch_model
from safetensors.numpy import load_file, save_file

import jaxgen
from jaxgen.checkpoint.load import abstract
from jaxgen.models.encoder_decoder.t5 import T5Config, distance_buckets

CONFIG = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 2,
}
IDS = np.random.default_rng(0).integers(3, VOCAB, (3, 7))


# ---- Distances ----


@pytest.mark.oracle
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "farthest"), [(32, 128), (32, 64), (32, 256), (32, 20), (8, 12), (16, 1000), (64, 128), (5, 7), (4, 3)]
)
def test_the_bucket_of_every_distance_is_that_of_torch(buckets: int, farthest: int, bidirectional: bool) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config.from_json(
        CONFIG | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
    )
    table = distance_buckets(config, bidirectional)
    distances = np.arange(-4096, 4097)
    expected = T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional, buckets, farthest)
    np.testing.assert_array_equal(table[np.clip(distances, -farthest, farthest) + farthest], expected.numpy())


@pytest.mark.parametrize("farthest", [1, 10, 16])
def test_distances_that_end_before_the_exact_buckets_do_are_refused(farthest: int) -> None:
    with pytest.raises(ValueError, match=rf"`relative_attention_max_distance`={farthest} .* must be more than 16"):
        T5Config.from_json(CONFIG | {"relative_attention_max_distance": farthest})


# ---- config.json ----


@pytest.mark.parametrize(
    ("said", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
    ids=str,
)
def test_the_files_of_three_ages_say_whether_the_output_is_scaled(said: dict[str, Any], scaled: bool) -> None:
    config = T5Config.from_json(CONFIG | said)
    assert config.scale_decoder_outputs is scaled
    assert T5Config.from_json(config.to_json()).scale_decoder_outputs is scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-gated-gelu"},
            "`feed_forward_proj`='gated-gated-gelu' in config.json is not",
        ),
        ({"feed_forward_proj": "maxout"}, "`feed_forward_proj`='maxout' in config.json is not supported"),
        ({"feed_forward_proj": 3}, "feed_forward_proj"),
        ({"num_heads": 0}, "num_heads"),
        ({"d_kv": "8"}, "d_kv"),
        ({"relative_attention_num_buckets": 2}, "must be at least 4"),
        ({"architectures": ["T5EncoderModel"]}, r"is not \['T5ForConditionalGeneration'\]"),
        ({"quantization_config": {"quant_method": "awq"}}, "`quant_method`='awq'"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abstract(CONFIG | changes)


def test_gated_gelu_is_the_one_by_tanh_and_gelu_alone_is_not() -> None:
    for said, meant in (("gated-gelu", "gelu_new"), ("gelu", "gelu"), ("gated-silu", "silu"), ("relu", "relu")):
        assert T5Config.from_json(CONFIG | {"feed_forward_proj": said}).activation == meant


def test_the_decoder_may_have_other_layers_and_heads_another_width() -> None:
    config = T5Config.from_json(CONFIG | {"num_decoder_layers": 1, "d_kv": 12})
    assert config.layers == (2, 1) and config.heads == (4, 4)
    model = jaxgen.from_config(CONFIG | {"num_decoder_layers": 1, "d_kv": 12})
    assert jaxgen.generate(model, IDS, max_new_tokens=3, decoder_start_token_id=0, eos_token_id=None).shape == (3, 4)


# ---- Files ----


def written(folder: Path, seed: int = 8) -> tuple[Path, dict[str, np.ndarray]]:
    """A T5's folder and its tensors."""
    encoder_decoder(seed).write(folder)
    return folder, load_file(folder / "model.safetensors")


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path)
    head = np.random.default_rng(1).standard_normal((VOCAB, 32), np.float32)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for tied in (True, False):
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        np.testing.assert_array_equal(jaxgen.load(folder).lm_head.weight[...], head)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"]}, folder / "model.safetensors")
    assert jaxgen.load(folder).lm_head is None


def test_copies_of_the_embedding_are_accepted_and_others_are_not(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    plain = jaxgen.load(folder)
    save_file(tensors | {name: tensors["shared.weight"] for name in names}, folder / "model.safetensors")
    for one, other in zip(jax.tree.leaves(jaxgen.load(folder)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    for name in names:
        save_file(tensors | {name: tensors["shared.weight"] + 1}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"`{name}` differs from `shared.weight`, which it should equal"):
            jaxgen.load(folder)
    # Some files have only a copy.
    others = {name: tensor for name, tensor in tensors.items() if name != "shared.weight"}
    save_file(others | {names[0]: tensors["shared.weight"]}, folder / "model.safetensors")
    np.testing.assert_array_equal(jaxgen.load(folder).shared.weight[...], tensors["shared.weight"])


def test_the_tensor_that_old_files_have_too_many_is_ignored(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path)
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(tensors | {stray: np.ones((8, 4), np.float32)}, folder / "model.safetensors")
    assert jaxgen.generate(jaxgen.load(folder), IDS, max_new_tokens=2).shape == (3, 3)
    save_file(tensors | {stray.replace("EncDec", "EncEnc"): np.ones((8, 4), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="EncEncAttention"):
        jaxgen.load(folder)


SEEDS = {"t5": 30, "bart": 11, "mt5": 2, "mbart": 3, "umt5": 34, "pegasus": 5, "marian": 7, "m2m_100": 9}
families = pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)


@families
def test_what_is_saved_and_loaded_is_saved_again_to_the_byte(seed: int, tmp_path: Path) -> None:
    model = jaxgen.load(encoder_decoder(seed).write(tmp_path / "original"))
    jaxgen.save(model, tmp_path / "first")
    again = jaxgen.load(tmp_path / "first")
    assert again.config == model.config
    jaxgen.save(again, tmp_path / "second")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    original, first = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "first"))
    for name in first.keys() & original.keys():
        assert first[name].tobytes() == original[name].tobytes()
    copies = {f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert not first.keys() - original.keys() - copies


@pytest.mark.oracle
@families
def test_transformers_reads_what_was_saved_and_gives_the_same_logits(seed: int, tmp_path: Path) -> None:
    import torch

    ours, theirs = pair(seed, tmp_path / "original")
    jaxgen.save(ours, tmp_path / "saved")
    saved = torch_model(tmp_path / "saved")
    text = np.random.default_rng(1).integers(3, VOCAB - 1, (3, 4))
    arguments = {"input_ids": torch.tensor(IDS % (VOCAB - 1)), "decoder_input_ids": torch.tensor(text)}
    with torch.no_grad():
        first, second = (each(**arguments).logits.numpy() for each in (theirs, saved))
    np.testing.assert_array_equal(first, second)
    found, atol = logits(ours, IDS % (VOCAB - 1), None, text), 1e-4 * np.abs(first).max()
    np.testing.assert_allclose(found, first, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("seed", [30, 11], ids=["t5", "bart"])
def test_weights_of_one_byte_give_finite_logits_near_those_of_the_model(seed: int, tmp_path: Path) -> None:
    folder = encoder_decoder(seed).write(tmp_path)
    small, model = jaxgen.load(folder, quantize="int8"), jaxgen.load(folder)
    ids = jaxgen.generate(small, IDS % (VOCAB - 1), max_new_tokens=3, eos_token_id=None)
    assert ids.shape == (3, 4) and ids.max() < VOCAB
    text = ids[:, :2]
    whole, rounded = (np.asarray(logits(each, IDS % (VOCAB - 1), None, text)) for each in (model, small))
    assert np.isfinite(rounded).all() and np.corrcoef(whole.ravel(), rounded.ravel())[0, 1] > 0.95


# ---- Numbers ----


@pytest.mark.oracle
@pytest.mark.parametrize("columns", [300, 384], ids=["at once", "in blocks"])
def test_logits_of_a_long_source_and_a_long_text_equal_those_of_torch(columns: int, tmp_path: Path) -> None:
    """Longer than the farthest distance; attention over a multiple of 128 columns is computed in blocks."""
    import torch

    ours, theirs = pair(30, tmp_path)
    rng = np.random.default_rng(2)
    ids, text = rng.integers(3, VOCAB, (2, columns)), rng.integers(3, VOCAB, (2, 40))
    mask = (np.arange(columns) < np.array([[columns], [170]])).astype(np.int64)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(text)
        ).logits.numpy()
    np.testing.assert_allclose(logits(ours, ids, mask, text), expected, rtol=1e-3, atol=2e-4)
    whole = jaxgen.generate(ours, ids, attention_mask=mask, decoder_input_ids=text, max_new_tokens=4)
    theirs_too = torch_generate(theirs, ids, attention_mask=mask, decoder_input_ids=text, max_new_tokens=4)
    np.testing.assert_array_equal(whole, theirs_too)


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [
        pytest.param(seed, dtype, id=f"{name}-{dtype}", marks=[] if usual else [pytest.mark.sweep])
        for seed, name in ((30, "t5"), (11, "bart"), (7, "marian"), (9, "m2m_100"))
        for dtype, usual in (("float16", True), ("bfloat16", name == "t5"))
    ],
)
def test_half_precision_is_finite_and_near_the_whole(seed: int, dtype: str, tmp_path: Path) -> None:
    folder = encoder_decoder(seed).write(tmp_path)
    half, whole = jaxgen.load(folder, dtype=dtype), jaxgen.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} <= {jnp.dtype(dtype), jnp.dtype(jnp.float32)}
    text = np.random.default_rng(1).integers(3, VOCAB - 1, (3, 4))
    near, exact = (np.asarray(logits(each, IDS % (VOCAB - 1), None, text)) for each in (half, whole))
    assert near.dtype == np.float32 and np.isfinite(near).all()
    assert np.corrcoef(near.ravel(), exact.ravel())[0, 1] > (0.9 if dtype == "bfloat16" else 0.99)


def test_what_overflows_float16_is_clamped_in_a_t5(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path)
    tensors = {name: 60 * each if name.endswith(".wo.weight") else each for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    model = jaxgen.load(folder, dtype="float16")
    out = jaxgen.generate(model, IDS, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    assert np.isfinite(out.logits).all()


def test_a_dialect_is_part_of_what_decides_a_program() -> None:
    config = T5Config.from_json(CONFIG)
    assert config == replace(config) and hash(config) == hash(replace(config))
    assert config != replace(config, scale_decoder_outputs=False)

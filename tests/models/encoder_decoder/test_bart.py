"""BART and its relatives: positions, biases, what their files may say, and numbers as in transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from encoder_decoders import VOCAB, encoder_decoder, logits, pair, torch_generate, torch_model
from safetensors.numpy import load_file, save_file

import jaxgen
from jaxgen.checkpoint.load import abstract
from jaxgen.models.encoder_decoder.bart import sinusoids

SEEDS = {"bart": 1, "mbart": 3, "pegasus": 5, "marian": 7, "m2m_100": 9}
IDS = np.random.default_rng(0).integers(3, VOCAB - 1, (3, 7))
BIAS = "final_logits_bias"


def config_of(seed: int, **changes: Any) -> dict[str, Any]:
    return {**encoder_decoder(seed).config, **changes}


# ---- config.json ----


@pytest.mark.parametrize(
    ("seed", "changes", "message"),
    [
        (1, {"decoder_attention_heads": 5}, "`d_model`=32 is not a multiple of 5 attention heads"),
        (1, {"encoder_attention_heads": 3}, "`d_model`=32 is not a multiple of 3 attention heads"),
        (1, {"activation_function": "swiglu"}, "`activation_function`='swiglu' is not supported"),
        (1, {"normalize_before": True}, "`normalize_before`=True in config.json makes another architecture of a bart"),
        (1, {"decoder_layers": 0}, "decoder_layers"),
        (1, {"architectures": ["BartForSequenceClassification"]}, r"is not \['BartForConditionalGeneration'\]"),
        (7, {"share_encoder_decoder_embeddings": False}, "makes another architecture of a marian"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused_with_its_key(
    seed: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        abstract(config_of(seed, **changes))


# ---- Files ----


@pytest.mark.oracle
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(1, id="bart"),
        pytest.param(3, id="mbart", marks=pytest.mark.sweep),
        pytest.param(5, id="pegasus", marks=pytest.mark.sweep),
        pytest.param(7, id="marian"),
    ],
)
def test_a_bias_of_the_logits_counts_and_may_be_missing(seed: int, tmp_path: Path) -> None:
    folder = encoder_decoder(seed).write(tmp_path / "with")
    tensors = load_file(folder / "model.safetensors")
    bias = np.random.default_rng(1).standard_normal((1, VOCAB), np.float32)
    save_file({**tensors, BIAS: bias}, folder / "model.safetensors")
    model = jaxgen.load(folder)
    np.testing.assert_array_equal(model.final_logits_bias[...], bias)
    save_file({name: each for name, each in tensors.items() if name != BIAS}, folder / "model.safetensors")
    without = jaxgen.load(folder)
    assert without.final_logits_bias is None
    found, plain = (np.asarray(logits(each, IDS, None, IDS[:, :3])) for each in (model, without))
    np.testing.assert_allclose(found - plain, np.broadcast_to(bias, found.shape), atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_copies_of_the_embedding_are_accepted_and_others_are_not(seed: int, tmp_path: Path) -> None:
    folder = encoder_decoder(seed).write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    plain = jaxgen.load(folder)
    save_file({**tensors, name: tensors["model.shared.weight"]}, folder / "model.safetensors")
    for one, other in zip(jax.tree.leaves(jaxgen.load(folder)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    save_file({**tensors, name: tensors["model.shared.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"`{name}` differs from `model.shared.weight`, which it should equal"):
        jaxgen.load(folder)


def test_sines_and_cosines_in_a_file_are_not_kept_and_others_bring_a_warning(tmp_path: Path) -> None:
    folder = encoder_decoder(7).write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    table = sinusoids(64, 32)
    names = [f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")]
    save_file({**tensors, **dict.fromkeys(names, table)}, folder / "model.safetensors")
    assert jaxgen.load(folder).encoder.embed_positions is None
    save_file({**tensors, **dict.fromkeys(names, table + 0.1)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="embed_positions.weight` differs from the values that config.json implies"):
        jaxgen.load(folder)


# ---- Numbers ----


@pytest.mark.oracle
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_logits_of_a_long_source_and_a_long_text_equal_those_of_torch(seed: int, tmp_path: Path) -> None:
    """Longer than a block of attention, with padding on the left, which M2M100 does not count."""
    import torch

    member = encoder_decoder(seed)
    member.config["max_position_embeddings"] = 320
    folder = member.write(tmp_path)
    ours, theirs = jaxgen.load(folder), torch_model(folder)
    pad = member.config["pad_token_id"]
    rng = np.random.default_rng(2)
    text = rng.integers(3, VOCAB - 1, (2, 40))
    for left in (True, False):
        mask = (np.arange(300) < np.array([[300], [170]])).astype(np.int64)
        mask = mask[:, ::-1].copy() if left else mask
        ids = np.where(mask, rng.integers(3, VOCAB - 1, (2, 300)), pad)
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(text)
            ).logits.numpy()
        # Weights of this spread multiply the rounding of float32, in torch as here.
        np.testing.assert_allclose(
            logits(ours, ids, mask, text), expected, rtol=1e-3, atol=3e-4 * np.abs(expected).max()
        )


@pytest.mark.oracle
def test_an_m2m100_does_not_count_padding_on_the_left(tmp_path: Path) -> None:
    ours, theirs = pair(9, tmp_path)
    mask = (np.arange(7) >= np.array([[0], [2], [5]])).astype(np.int64)
    ids = np.where(mask, IDS, theirs.config.pad_token_id)
    options = {"max_new_tokens": 8, "eos_token_id": None}
    found = jaxgen.generate(ours, ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(found, torch_generate(theirs, ids, attention_mask=mask, **options))
    for row, first in enumerate([0, 2, 5]):
        np.testing.assert_array_equal(jaxgen.generate(ours, IDS[row : row + 1, first:], **options)[0], found[row])


@pytest.mark.oracle
@pytest.mark.parametrize("width", [31, 32])
def test_the_table_of_sines_and_cosines_is_that_of_transformers(width: int) -> None:
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    table = MarianSinusoidalPositionalEmbedding(512, width, None)
    np.testing.assert_allclose(sinusoids(512, width), table.create_weight().numpy(), atol=1e-6)


def test_generation_fields_of_an_old_config_count_if_there_is_no_generation_config(tmp_path: Path) -> None:
    folder = encoder_decoder(11).write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    old = {"num_beams": 4, "max_length": 7, "forced_eos_token_id": 2, "task_specific_params": {"x": {"max_length": 3}}}
    (folder / "config.json").write_text(json.dumps(config | old))
    model = jaxgen.load(folder)
    found = jaxgen.generate(model, IDS, return_dict_in_generate=True)
    assert found.sequences.shape[1] <= 7 and found.beam_indices.shape[0] == 3
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (4, 7)
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 2, "eos_token_id": 2}))
    assert jaxgen.load(folder).generation_config.num_beams in (None, 1)


@pytest.mark.parametrize("seed", [1, 9], ids=["bart", "m2m_100"])
def test_positions_need_no_broadcast_that_jax_may_refuse(seed: int, tmp_path: Path) -> None:
    model = jaxgen.load(encoder_decoder(seed).write(tmp_path))
    run = jax.jit(lambda model: model(IDS, decoder_input_ids=IDS[:, :3]))
    plain = run(model)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        np.testing.assert_array_equal(run(model), plain)

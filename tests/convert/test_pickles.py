"""Pickles are read on request only, by the restricted loader, in another process; nothing of theirs ever runs."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import CONFIG, Tensors, assert_same_bits, random_tensors, write_checkpoint, write_json
from jaxgen.convert import pickles

import jaxgen
from jaxgen import CheckpointError, convert

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("processes_with_torch")]

TIED = CONFIG | {"tie_word_embeddings": True}


def save_pickle(path: Path, tensors: Tensors, **more: Any) -> None:
    import torch

    torch.save({name: torch.tensor(array) for name, array in tensors.items()} | more, path)


def converted(source: Path) -> Any:
    with pytest.warns(UserWarning, match="is read from pickles"):
        report = convert.convert_checkpoint(source, source.parent / "converted", allow_pickle=True)
    assert sorted(source.parent.glob("converted*")) == [report.folder]
    return jaxgen.load(report.folder)


def test_the_bin_files_of_transformers_are_read(tmp_path: Path) -> None:
    tensors = random_tensors()
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", CONFIG)
    (source / "tokenizer.json").write_text("{}")
    index = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        save_pickle(source / file, {name: tensors[name] for name, owner in index.items() if owner == file})
    write_json(source / "pytorch_model.bin.index.json", {"weight_map": index})
    plain = write_checkpoint(tmp_path / "plain", tensors=tensors)
    assert_same_bits(converted(source), jaxgen.load(plain))
    convert.convert_to_hugging_face(tmp_path / "converted", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_same_bits(jaxgen.load(tmp_path / "back"), jaxgen.load(plain))


def test_a_single_bin_file_whose_tied_head_shares_its_memory_is_read(tmp_path: Path) -> None:
    import torch

    tensors = {name: torch.tensor(array) for name, array in random_tensors(TIED).items()}
    (tmp_path / "source").mkdir()
    write_json(tmp_path / "source" / "config.json", TIED)
    shared = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(shared, tmp_path / "source" / "pytorch_model.bin")
    plain = write_checkpoint(tmp_path / "plain", TIED, random_tensors(TIED))
    assert_same_bits(converted(tmp_path / "source"), jaxgen.load(plain))


def test_safetensors_are_read_where_there_are_both(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    save_pickle(source / "pytorch_model.bin", random_tensors(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert.convert_checkpoint(source, tmp_path / "converted", allow_pickle=True)
    assert_same_bits(jaxgen.load(tmp_path / "converted"), jaxgen.load(source))


# Meta's own files

META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
BY_COLUMNS = ("attention.wo", "feed_forward.w2")


def to_meta(tensors: Tensors, heads: dict[str, int], pieces: int, embedding_by_rows: bool) -> list[Tensors]:
    """The other way round: what Meta would have published as so many pieces."""
    parts: list[Tensors] = [{"rope.freqs": np.ones(4, np.float32)} for _ in range(pieces)]
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            prefix = f"layers.{number}."
        meta = META[module]
        if module in heads:  # halves -> neighbours
            rows, columns = array.shape
            array = (
                array.reshape(heads[module], 2, rows // heads[module] // 2, columns).swapaxes(1, 2).reshape(array.shape)
            )
        axis = 1 if meta in BY_COLUMNS or (meta == "tok_embeddings" and not embedding_by_rows) else 0
        cut = [array] * pieces if array.ndim == 1 else np.split(array, pieces, axis)
        for part, piece in zip(parts, cut, strict=True):
            part[f"{prefix}{meta}.weight"] = np.ascontiguousarray(piece)
    return parts


@pytest.mark.parametrize(
    ("pieces", "kv_heads", "embedding_by_rows", "scaled_rope"),
    [(1, 4, True, True), (2, 2, True, False), (2, 2, False, False)],
    ids=["one piece, Llama 3.1", "Llama 3", "Llama 2"],
)
def test_the_checkpoint_of_meta_is_turned_and_joined(
    pieces: int, kv_heads: int, embedding_by_rows: bool, scaled_rope: bool, tmp_path: Path
) -> None:
    config = CONFIG | {"num_key_value_heads": kv_heads}
    tensors = random_tensors(config)
    source = tmp_path / "source"
    source.mkdir()
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": kv_heads}
    for number, part in enumerate(to_meta(tensors, heads, pieces, embedding_by_rows)):
        save_pickle(source / f"consolidated.{number:02}.pth", part)
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": kv_heads, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"use_scaled_rope": True, "rope_theta": 500000.0} if scaled_rope else {}
    write_json(source / "params.json", params)
    with pytest.raises(CheckpointError, match=r"as Meta distributes it.*--allow-pickle"):
        jaxgen.load(source)
    model = converted(source)
    plain = jaxgen.load(write_checkpoint(tmp_path / "plain", config, tensors))
    for ours, expected in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()
    assert (model.config.num_key_value_heads, model.config.vocab_size) == (kv_heads, 48)
    assert model.generation_config.eos_token_id == 2
    if scaled_rope:
        assert model.config.rope.factor == 8.0
        assert json.loads((tmp_path / "converted" / "config.json").read_text())["max_position_embeddings"] == 131_072


@pytest.mark.parametrize(
    ("rows", "layers", "expected"),
    [
        (32_000, 32, (4096, 2, None)),
        (128_256, 32, (8192, [128001, 128008, 128009], None)),
        (128_256, 80, (131_072, [128001, 128008, 128009], 8.0)),
        (128_256, 16, (131_072, [128001, 128008, 128009], 32.0)),
        (128_256, 28, (131_072, [128001, 128008, 128009], 32.0)),
    ],
)
def test_what_meta_does_not_say_follows_from_the_sizes_of_the_model(rows: int, layers: int, expected: Any) -> None:
    params = {"dim": 64, "n_layers": layers, "n_heads": 4, "norm_eps": 1e-5, "use_scaled_rope": expected[2] is not None}
    shapes = {"model.embed_tokens.weight": (rows, 64), "model.layers.0.mlp.gate_proj.weight": (128, 64)}
    config = pickles._meta_config(params, shapes)
    factor = config.get("rope_scaling", {}).get("factor")
    assert (config["max_position_embeddings"], config["eos_token_id"], factor) == expected


# What a pickle may not do


class Canary:
    """Its pickle makes a file when it is read without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("allowed", [False, True])
def test_the_code_in_a_pickle_never_runs(name: str, allowed: bool, tmp_path: Path) -> None:
    source, canary = tmp_path / "source", tmp_path / "canary"
    source.mkdir()
    write_json(source / "config.json", CONFIG)
    write_json(source / "params.json", {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5})
    save_pickle(source / name, random_tensors(), canary=Canary(canary))
    (source / "torch.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    there = Path.cwd()
    os.chdir(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(CheckpointError, match="restricted loader refuses" if allowed else "--allow-pickle"):
                convert.convert_checkpoint(source, tmp_path / "converted", allow_pickle=allowed)
    finally:
        os.chdir(there)
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", CONFIG)
    save_pickle(source / "pytorch_model.bin", random_tensors(), epoch=3)
    with (
        pytest.warns(UserWarning, match="pickles"),
        pytest.raises(CheckpointError, match="does not hold a dict of tensors"),
    ):
        convert.convert_checkpoint(source, tmp_path / "converted", allow_pickle=True)

"""A family that is no Llama needs a file and a row in the registry: here both, and nothing else is changed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import hashes, write_checkpoint
from flax import nnx
from jax.sharding import PartitionSpec

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.source import named_leaves, open_checkpoint
from jaxgen.cli.main import main
from jaxgen.kv_cache import KVCache
from jaxgen.models import FAMILIES
from jaxgen.models.family import Family, ForwardPass
from jaxgen.models.layers import Embed, HostOnly, Linear
from jaxgen.planning.plan import plan

# ---- What `models/average.py` would hold ----


@dataclass(frozen=True)
class AverageConfig:
    vocab_size: int
    n_embd: int
    tie_word_embeddings: bool

    @property
    def model_type(self) -> str:
        return "average"

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    def to_json(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **asdict(self)}


class Average(nnx.Module):
    """The logits of a token's successor are those of the mean of all embeddings so far."""

    max_position_embeddings = 64
    is_encoder_decoder = has_position_table = False

    def __init__(self, config: AverageConfig, rngs: nnx.Rngs, generation_config: Any = None, mesh: Any = None):
        self.config, self.mesh, self.host = config, mesh, HostOnly(generation_config)
        sizes, tied = (config.vocab_size, config.n_embd), config.tie_word_embeddings
        self.wte = Embed(*sizes, std=0.1, rngs=rngs)
        self.score = None if tied else Linear(*sizes[::-1], bias=False, std=0.1, rngs=rngs)

    vocab_size = property(lambda self: self.config.vocab_size)
    hidden_size = property(lambda self: self.config.n_embd)
    dtype = property(lambda self: self.wte.weight[...].dtype)
    generation_config = property(lambda self: self.host.value)
    cache_bytes_per_token = property(lambda self: 2 * self.config.n_embd * self.dtype.itemsize)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "generation_config":
            name, value = "host", HostOnly(value)
        super().__setattr__(name, value)

    @property
    def slots_per_block(self) -> int | None:
        return None

    def intermediates_bytes(self, name: str, columns: int, slots: int) -> int:
        raise NotImplementedError

    def make_cache(self, rows: int, slots: int) -> KVCache:
        return KVCache.zeros(1, rows, slots, 1, self.config.n_embd, self.dtype)

    def extend(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: Any = None,
        intermediates: Any = (),
    ) -> tuple[jax.Array, KVCache, dict[str, Any]]:
        """See `base.Model.extend`."""
        x = self.wte(input_ids)[:, None]
        cache, _, mask = cache.extend(attention_mask, position_ids)
        cache, seen, _ = cache.update(0, x, x)
        total = mask[:, -1].astype(x.dtype)[:, None] @ seen.reshape(len(x), -1, x.shape[-1])
        mean = total[:, 0] / jnp.maximum(mask[:, -1].sum(axis=1, keepdims=True), 1)
        return (self.wte.attend(mean) if self.score is None else self.score(mean)).astype(jnp.float32), cache, {}


def weight_map(config: AverageConfig) -> dict[str, dict[str, int]]:
    table = {"wte.weight": {"transformer.wte.weight": config.vocab_size}}
    return table if config.tie_word_embeddings else table | {"score.weight": {"score.weight": config.vocab_size}}


def read(raw: Mapping[str, Any], generation_fields: frozenset[str] = frozenset()) -> AverageConfig:
    del generation_fields
    return AverageConfig(raw["vocab_size"], raw["n_embd"], raw["tie_word_embeddings"])


AVERAGE = Family(
    config=read,
    unread_keys=lambda raw, generation_fields: [],
    build=Average,
    embedding="wte.weight",
    head="score.weight",
    prefix="transformer.",
    weight_map=weight_map,
    buffers={".counts": lambda config: np.arange(config.n_embd, dtype=np.float32), ".unused": None},
    partition=lambda config, mesh: lambda path: PartitionSpec(),
    activation_bytes=lambda config, forward: forward.itemsize * forward.rows * forward.columns * config.n_embd,
    describe=lambda config: f"the mean of {config.n_embd} numbers",
)

# ---- Its tests ----

CONFIG = {
    "model_type": "average",
    "vocab_size": 40,
    "n_embd": 8,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "eos_token_id": None,
}
EMBEDDING, HEAD = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
TENSORS = {"transformer.wte.weight": EMBEDDING, "score.weight": HEAD}
PROMPT = [[5, 6, 7]]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "average", AVERAGE)


def continued(head: np.ndarray, embedding: np.ndarray = EMBEDDING) -> list[int]:
    """Four tokens more than the prompt, by the formula."""
    ids = [*PROMPT[0]]
    for _ in range(4):
        ids.append(int(np.argmax(head @ embedding[ids].mean(axis=0))))
    return ids


def generated(folder: Path) -> list[int]:
    return np.asarray(jaxgen.generate(jaxgen.load(folder), PROMPT, max_new_tokens=4))[0].tolist()


def test_it_is_loaded_and_generates(tmp_path: Path) -> None:
    assert generated(write_checkpoint(tmp_path, CONFIG, TENSORS)) == continued(HEAD)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "wte.weight"])
def test_without_a_head_it_has_the_embedding_s_under_either_name(name: str, tmp_path: Path) -> None:
    assert generated(write_checkpoint(tmp_path, CONFIG, {name: EMBEDDING})) == continued(EMBEDDING)


def test_a_head_in_spite_of_the_config_must_equal_the_embedding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True}, TENSORS)
    with pytest.raises(CheckpointError, match=r"but `score.weight` differs from `transformer.wte.weight`"):
        jaxgen.load(folder)


def test_its_vocabulary_and_dtype_are_those_of_its_embedding(tmp_path: Path) -> None:
    half = {name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}
    folder = write_checkpoint(tmp_path, CONFIG | {"vocab_size": 39, "dtype": None}, half)
    with pytest.warns(UserWarning, match="the embedding has 40 rows, but config.json says `vocab_size`=39"):
        model = jaxgen.load(folder)
    assert model.vocab_size == 40 and model.dtype == np.float16


def test_its_buffers_are_compared_and_not_loaded(tmp_path: Path) -> None:
    counts, unused = np.arange(8, dtype=np.float32), np.ones(3, np.float32)
    right = TENSORS | {"transformer.counts": counts, "transformer.unused": unused}
    source = open_checkpoint(write_checkpoint(tmp_path / "right", CONFIG, right))
    assert not source.warnings and {*source.buffers} == right.keys() - TENSORS.keys()
    wrong = open_checkpoint(write_checkpoint(tmp_path / "wrong", CONFIG, right | {"transformer.counts": counts + 1}))
    assert (
        "`transformer.counts` differs from the values that config.json implies" in wrong.warnings[0]
        and len(wrong.warnings) == 1
    )


def test_it_is_saved_and_converted_and_comes_back(tmp_path: Path) -> None:
    headless = {"wte.weight": EMBEDDING}
    source = write_checkpoint(tmp_path / "source", CONFIG, headless)
    convert.convert_checkpoint(source, tmp_path / "native")
    convert.convert_to_hugging_face(tmp_path / "native", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)
    jaxgen.save(jaxgen.load(tmp_path / "native"), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert generated(tmp_path / "saved") == generated(tmp_path / "native") == continued(EMBEDDING)


def test_it_is_made_of_a_config_and_quantised() -> None:
    model = jaxgen.from_config(CONFIG, quantize="int8")
    assert {path.partition(".")[0] for path, _ in named_leaves(model)} == {"wte", "score"}
    with pytest.raises(ValueError, match="`model` is quantised"):
        jaxgen.save(model, "nowhere")


def test_it_is_planned_by_its_own_estimate(tmp_path: Path) -> None:
    found = plan(write_checkpoint(tmp_path, CONFIG, TENSORS), 2, 16, 16, device="v5e")
    logits = 4 * 2 * 40
    assert (found.parameters, found.weights) == (640, 2560)
    assert found.cache == 2 * found.slots * 2 * 8 * 4
    assert found.decode_temporaries == logits + AVERAGE.activation_bytes(
        read(CONFIG), ForwardPass(2, 1, 32, 4, 1, "tpu")
    )
    # A step reads the head, but not the embedding, and the cache.
    assert found.step_ms == pytest.approx(1e3 * (1280 + 2 * 32 * 64) / 819e9)


def test_it_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_checkpoint(tmp_path, CONFIG, TENSORS))]) == 0
    said = capsys.readouterr().out
    assert "average, the mean of 8 numbers" in said and "64 B per token and row" in said

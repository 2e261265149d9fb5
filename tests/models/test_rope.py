"""The frequencies of every `rope_type` against transformers and numbers on record, and what a config may not say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import rope
from jaxgen.models.rope import Rope

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1, 1.1, 1.2, 1.3],
    "long_factor": [2, 3.0, 4.0, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

# Parameters, length of the batch, and what transformers 5.24 computes for head_dim 8 and 128 positions.
GOLDENS = [
    ({"rope_type": "default", "rope_theta": 1e4}, 1, [1, 0.1, 0.01, 0.001], 1),
    ({"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}, 1, [0.25, 0.02102241, 0.001767767, 0.0001486509], 1),
    (DYNAMIC, 1, [1, 0.1, 0.01, 0.001], 1),
    (DYNAMIC, 128, [1, 0.1, 0.01, 0.001], 1),
    (DYNAMIC, 136, [1, 0.09283178, 0.008617739, 0.0008], 1),
    (DYNAMIC, 192, [1, 0.06933612, 0.004807498, 0.0003333333], 1),
    (YARN, 1, [1, 0.025, 0.0025, 0.00025], 1.138629436),
    (YARN | {"original_max_position_embeddings": None}, 1, [1, 0.0625, 0.0025, 0.00025], 1.138629436),
    (YARN | {"factor": None}, 1, [1, 0.025, 0.0025, 0.00025], 1.138629436),
    (YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}, 1, [1, 0.025, 0.0025, 0.00025], 1.0249579608),
    (YARN | {"attention_factor": 0.75}, 1, [1, 0.025, 0.0025, 0.00025], 0.75),
    (
        YARN | {"original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
        1,
        [1, 0.1, 0.008892429, 0.00025],
        1.138629436,
    ),
    (LLAMA3, 1, [1, 0.004700754, 0.0001767767, 6.64787e-06], 1),
    (LLAMA3 | {"original_max_position_embeddings": 320}, 1, [1, 0.01473971, 0.0001767767, 6.64787e-06], 1),
    (LONGROPE, 32, [1, 0.09090909, 0.008333333, 0.0007692308], 1.1832159566),
    (LONGROPE, 33, [0.5, 0.03333333, 0.0025, 0.0002], 1.1832159566),
    (LONGROPE | {"factor": 1.0}, 33, [0.5, 0.03333333, 0.0025, 0.0002], 1),
    (LONGROPE | {"attention_factor": 1.5}, 32, [1, 0.09090909, 0.008333333, 0.0007692308], 1.5),
]


def name(value: Any) -> str | None:
    return value.get("rope_type") if isinstance(value, dict) else None


def read(parameters: dict[str, Any], head_dim: int = 8, longest: int = 128) -> Rope:
    return rope.from_config({"max_position_embeddings": longest, "rope_parameters": parameters}, head_dim)


@pytest.mark.parametrize(("parameters", "length", "frequencies", "scaling"), GOLDENS, ids=name)
def test_frequencies_and_scaling_are_those_on_record(
    parameters: dict[str, Any], length: int, frequencies: list[float], scaling: float
) -> None:
    found = read(parameters)
    for traced in (found.inverse_frequencies, jax.jit(found.inverse_frequencies)):
        np.testing.assert_allclose(traced(length), frequencies, rtol=1e-6)
    assert found.attention_scaling() == pytest.approx(scaling, rel=1e-9)


class TransformersRope:
    """The same rope, computed by transformers."""

    def __init__(self, parameters: dict[str, Any], head_dim: int, longest: int):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": longest}
        self.config = LlamaConfig(**config, rope_parameters=dict(parameters))
        self.embedding = LlamaRotaryEmbedding(self.config)

    def frequencies_and_scaling(self, length: int) -> tuple[np.ndarray, float]:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope_type = self.config.rope_parameters["rope_type"]
        if rope_type == "default":
            frequencies, scaling = self.embedding.compute_default_rope_parameters(self.config)
        else:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](self.config, None, seq_len=length)
        return frequencies.numpy(), scaling

    def cos_sin(self, positions: np.ndarray, dtype: str) -> list[np.ndarray]:
        import torch

        x = torch.zeros(1, dtype=getattr(torch, dtype))
        return [each.float().numpy() for each in self.embedding(x, torch.tensor(positions))]


def long_factors(head_dim: int) -> dict[str, Any]:
    half = np.arange(head_dim // 2)
    return {"short_factor": (1 + 0.01 * half).tolist(), "long_factor": (1.5 + 0.5 * half).tolist()}


# head_dim, positions, parameters
LARGE = [
    (64, 2048, {"rope_type": "default", "rope_theta": 5e5}),
    (64, 2048, {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}),
    (128, 2048, {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}),
    (16, 100, DYNAMIC),
    (128, 8192, YARN | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 4096}),
    (64, 8192, YARN | {"original_max_position_embeddings": 1024, "truncate": False, "beta_fast": 20.0}),
    (128, 131072, LLAMA3 | {"original_max_position_embeddings": 8192}),
    (64, 131072, LLAMA3 | {"factor": 32.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 8192}),
    (96, 4096, LONGROPE | {"original_max_position_embeddings": 256} | long_factors(96)),
    (32, 4096, LONGROPE | {"factor": 2.5} | long_factors(32)),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("head_dim", "longest", "parameters"), LARGE, ids=name)
@pytest.mark.parametrize("length", [1, 256, 257, 20000])
def test_frequencies_and_scaling_equal_transformers(
    parameters: dict[str, Any], head_dim: int, longest: int, length: int
) -> None:
    ours = read(parameters, head_dim, longest)
    frequencies, scaling = TransformersRope(parameters, head_dim, longest).frequencies_and_scaling(length)
    np.testing.assert_allclose(ours.inverse_frequencies(length), frequencies, rtol=1e-6)
    assert ours.attention_scaling() == pytest.approx(scaling, rel=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize(("head_dim", "longest", "parameters"), LARGE, ids=name)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 2**-7)])
def test_cosines_and_sines_equal_transformers(
    parameters: dict[str, Any], head_dim: int, longest: int, dtype: str, tolerance: float
) -> None:
    positions = np.array([[0, 1, 7, 100, 999], [3, 4, 5, 6, 7]])
    theirs = TransformersRope(parameters, head_dim, longest).cos_sin(positions, dtype)
    ours = rope.cos_sin(read(parameters, head_dim, longest), jnp.asarray(positions), dtype)
    assert [each.dtype for each in ours] == [dtype] * 2
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=tolerance)


def test_rotated_vectors_keep_their_length_and_products_depend_on_the_distance_alone() -> None:
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 8), np.float32)

    def at(vector: np.ndarray, position: int) -> np.ndarray:
        cos, sin = rope.cos_sin(read({}), jnp.array([[position]]), jnp.float32)
        return np.asarray(rope.rotate(jnp.asarray(vector), cos, sin)).ravel()

    np.testing.assert_array_equal(at(query, 0), query.ravel())
    assert np.linalg.norm(at(query, 9)) == pytest.approx(np.linalg.norm(query), rel=1e-6)
    assert at(query, 9) @ at(key, 4) == pytest.approx(at(query, 25) @ at(key, 20), rel=1e-4)
    assert at(query, 9) @ at(key, 4) != pytest.approx(at(query, 9) @ at(key, 5), rel=1e-4)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("parameters", [golden[0] for golden in GOLDENS], ids=name)
def test_the_spellings_of_transformers_4_and_5_give_equal_ropes(parameters: dict[str, Any], type_key: str) -> None:
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    scaling[type_key] = parameters["rope_type"]
    old = {"max_position_embeddings": 128, "rope_theta": parameters["rope_theta"], "rope_scaling": scaling}
    assert rope.from_config(old, 8) == read(parameters)
    assert rope.from_config(old | {"rope_parameters": parameters}, 8) == read(parameters)


@pytest.mark.parametrize("nothing", [{}, {"rope_scaling": None}, {"rope_parameters": None}, {"rope_parameters": {}}])
def test_a_config_that_says_nothing_has_the_default_rope(nothing: dict[str, Any]) -> None:
    raw = {"max_position_embeddings": 128, **nothing}
    assert rope.from_config(raw, 8) == read({"rope_type": "default", "rope_theta": 1e4})
    assert rope.from_config(raw | {"rope_theta": 500000}, 8) == read({"rope_type": "default", "rope_theta": 5e5})


@pytest.mark.parametrize("parameters", [YARN, LONGROPE, LLAMA3], ids=name)
def test_the_original_context_may_stand_outside_the_rope_parameters(parameters: dict[str, Any]) -> None:
    inside = {key: value for key, value in parameters.items() if key != "original_max_position_embeddings"}
    raw = {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": inside}
    assert rope.from_config(raw, 8) == read(parameters)


def test_a_partial_rotary_factor_of_one_says_nothing() -> None:
    assert read(YARN | {"partial_rotary_factor": 1.0}) == read(YARN)


@pytest.mark.parametrize("parameters", [golden[0] for golden in GOLDENS], ids=name)
def test_what_is_written_to_a_config_is_read_back_equal(parameters: dict[str, Any]) -> None:
    written = rope.to_config(read(parameters))
    assert written["rope_type"] == parameters["rope_type"]
    assert read(written) == read(parameters)


def without(parameters: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != key}


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}}, "rope_parameters.*rope_scaling.*disagree"),
        ({"rope_parameters": LLAMA3, "rope_theta": 1e4}, "`rope_theta`=10000.0 beside `rope_parameters`"),
        ({"rope_scaling": LINEAR | {"type": "dynamic"}}, "`rope_scaling`.*`type` and `rope_type`"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "`original_max_position_embeddings`=64 beside `rope_scaling`",
        ),
    ],
)
def test_two_statements_that_differ_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rope.from_config({"max_position_embeddings": 128, **config}, 8)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "magic"}, "`rope_type`='magic'.*llama3"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ("linear", "rope_parameters"),
        (["linear"], "rope_parameters"),
        (without(LINEAR, "factor"), r"lacks \['factor'\]"),
        (LINEAR | {"factor": None}, r"lacks \['factor'\]"),
        (without(LLAMA3, "low_freq_factor"), r"lacks \['low_freq_factor'\]"),
        (without(LONGROPE, "long_factor"), r"lacks \['long_factor'\]"),
        (LINEAR | {"factor": "2"}, "`factor`='2'"),
        (LINEAR | {"factor": [2.0]}, "factor"),
        (LINEAR | {"factor": 0}, "factor"),
        (LINEAR | {"rope_theta": "10000"}, "rope_theta"),
        (LINEAR | {"rope_theta": [1e4]}, "rope_theta"),
        (LINEAR | {"rope_theta": 0}, "rope_theta"),
        (YARN | {"truncate": "no"}, "`truncate`='no'"),
        (YARN | {"original_max_position_embeddings": "32"}, "original_max_position_embeddings"),
        (YARN | {"original_max_position_embeddings": -32}, "original_max_position_embeddings"),
        (LONGROPE | {"short_factor": [1.0, 1.0]}, "`short_factor`.*must be . numbers, half of `head_dim`"),
        (LONGROPE | {"long_factor": [1.0] * 5}, "`long_factor`.*must be . numbers, half of `head_dim`"),
        (LONGROPE | {"long_factor": [1.0, 1.0, 1.0, "1"]}, "`long_factor`"),
        (LONGROPE | {"short_factor": 3}, "short_factor"),
    ],
)
def test_parameters_that_make_no_rope_are_refused_by_name(parameters: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read(parameters)

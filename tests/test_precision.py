"""bf16 and fp16: as close to the float32 logits as transformers in the same dtype."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import Architecture, architecture
from oracle import torch_logits, torch_model

import jaxgen

pytestmark = pytest.mark.oracle

WIDER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 500}


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats between the next-token distributions, [..., V] logits each."""
    p, q = (jax.nn.log_softmax(jnp.asarray(logits), axis=-1) for logits in (reference, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Several models, since the ratio of two divergences scatters by a fifth from one to the next."""
    return [
        Architecture(seed, architecture(seed).config | WIDER | {"initializer_range": 0.08}).write(
            tmp_path_factory.mktemp("wider")
        )
        for seed in (0, 1, 9)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_diverge_no_more_than_those_of_transformers(dtype: str, folders: list[Path]) -> None:
    forward: Any = jax.jit(lambda model, ids: model(ids))
    ids = np.random.default_rng(0).integers(3, 500, (4, 128))
    ours, theirs = [], []
    for folder in folders:
        reference = torch_logits(torch_model(folder), ids)
        ours.append(kl(reference, np.asarray(forward(jaxgen.load(folder, dtype), jnp.asarray(ids)))))
        theirs.append(kl(reference, torch_logits(torch_model(folder, dtype), ids)))
    print(f"{dtype}: KL {np.mean(ours):.2e} nats, transformers {np.mean(theirs):.2e}")
    assert 0 < np.mean(ours) <= 1.25 * np.mean(theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decoding_in_half_precision_gives_finite_logits_rounded_to_the_dtype(dtype: str, folders: list[Path]) -> None:
    model = jaxgen.load(folders[0], dtype)
    logits, _, _ = model.extend(model.make_cache(2, 4), jnp.array([[3, 4], [5, 6]]), jnp.ones((2, 2), bool))
    assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
    np.testing.assert_array_equal(logits, logits.astype(dtype).astype(jnp.float32))  # so that ties fall as in HF

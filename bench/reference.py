"""The reference for decoded tokens: logits of whole texts without a cache, by transformers or by jaxgen."""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import DECODES
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgen

# Above that, a second copy of the weights for torch takes too long to make and to run.
_MOST_PARAMETERS = 1.5e9


@dataclass(frozen=True)
class Verdict:
    """How the new tokens of a call stand to the reference.

    Attributes:
        wrong: how many of them it would not have chosen, by more than rounding.
        ties: how many it would not have chosen, but by no more than that.
        log_p: float [B]. Log-probabilities of the whole continuations.
        furthest: how far the worst of them is behind.
        tolerance: what rounding may make of a logit, at most.
    """

    wrong: int
    ties: int
    log_p: np.ndarray
    furthest: float
    tolerance: float


class Reference:
    """The logits of a model, computed without a cache and one text at a time.

    By transformers on torch in float32 if it is installed and the model is not too large, and otherwise by the model's
    own forward pass over the whole text, which shares no cache and no loop with what it judges.
    """

    def __init__(self, model: Any):
        self.of = "jaxgen"
        self._dtype = model.dtype
        forward = jax.jit(lambda model, ids: model(ids)[0], out_shardings=everywhere(model.mesh))
        self._logits: Callable[[np.ndarray], Any] = lambda ids: forward(model, ids)
        sizes = sum(leaf.size for leaf in jax.tree.leaves(model))
        whole = all(leaf.dtype == model.dtype for leaf in jax.tree.leaves(model))  # and not quantised
        if whole and jax.process_count() == 1 and sizes < _MOST_PARAMETERS and importlib.util.find_spec("torch"):
            self.of = "transformers"
            self._logits = _twin(model)

    def judge(self, decode: str, prompts: np.ndarray, new: np.ndarray) -> Verdict:
        """Int [B, P] prompts and their int [B, T] continuations.

        Greedy tokens are to have the highest logit, sampled ones one of the `top_k` highest. Beams choose by whole
        texts, so that none of their tokens is wrong by itself.
        """
        columns = prompts.shape[1]
        k = DECODES[decode].get("top_k", 1)
        wrong = ties = 0
        log_p, furthest, tolerance = [], 0.0, 0.0
        for prompt, tokens in zip(prompts, new, strict=True):
            logits = self._logits(np.concatenate([prompt, tokens])[None, :-1].astype(np.int32))
            behind, own, largest = jax.device_get(_standing(logits[columns - 1 :], tokens.astype(np.int32), k))
            allowed = rounding(self._dtype) * float(largest)
            furthest, tolerance = max(furthest, float(behind.max())), max(tolerance, allowed)
            if decode != "beams":
                wrong += int((behind > allowed).sum())
                ties += int(((behind > 0) & (behind <= allowed)).sum())
            log_p.append(float(own.sum()))
        return Verdict(wrong, ties, np.array(log_p), furthest, tolerance)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of an output that every process of the mesh reads; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def rounding(dtype: Any) -> float:
    """What a logit may be off by, as a share of the largest: the errors of some dozens of roundings on the way."""
    return 8 * float(jnp.finfo(dtype).eps)


@functools.partial(jax.jit, static_argnums=2)
def _standing(logits: jax.Array, tokens: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How far each of int32 [T] tokens is behind the k-th highest logit, its log-probability, and the largest logit."""
    logits = jnp.asarray(logits, jnp.float32)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    behind = jnp.maximum(jax.lax.top_k(logits, k)[0][:, -1] - own, 0)
    return behind, own - jax.nn.logsumexp(logits, axis=1), jnp.abs(logits).max()


def _twin(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The forward pass of the same weights in transformers: int [1, T] -> float32 [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        jaxgen.save(model, folder)
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return twin(torch.tensor(ids, dtype=torch.long)).logits[0].numpy()

    return logits

"""Rotary position embeddings: every `rope_type` that Llama checkpoints use.

Same formulas as transformers 5.24 `modeling_rope_utils`, in NumPy float32: the frequencies are constants of the
program, in full precision for all dtypes of the model. The frequencies of `dynamic` and `longrope` depend on the
longest row of the batch, so they are traced.

Each type is a frozen dataclass whose fields are the keys of its `rope_parameters`. Required keys have no default.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Rope(Protocol):
    """The rotary parameters of a checkpoint."""

    def inverse_frequencies(self, length: jax.Array | int) -> jax.Array | np.ndarray:
        """float32 [H/2] radians per position, for a batch whose longest row has `length` tokens."""
        ...

    def attention_scaling(self) -> float:
        """The factor on cosines and sines, which scales attention scores in extended contexts."""
        ...


def cos_sin(rope: Rope, positions: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of one forward pass, computed in float32, then cast.

    Args:
        positions: int32 [N, T].

    Returns:
        Two arrays [N, T, H].
    """
    # `positions.max() + 1`: types that depend on the length use the longest row's frequencies for the whole batch.
    angles = positions[..., None].astype(jnp.float32) * rope.inverse_frequencies(positions.max() + 1)[None, None]
    # [N, T, H / 2] twice: dimensions i and i + H / 2 turn by the same angle.
    angles = jnp.concatenate([angles, angles], axis=-1)
    scaling = rope.attention_scaling()
    return (jnp.cos(angles) * scaling).astype(dtype), (jnp.sin(angles) * scaling).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [..., H] by angles [..., H]. Dimensions i and i + H/2 are a pair, as in Hugging Face checkpoints."""
    wide, cos, sin = (each.astype(jnp.float32) for each in (x, cos, sin))
    # (x, y) -> (x cos - y sin, y cos + x sin). It is turned before it is widened, since a TPU pads halves of H to whole
    # registers in memory (8B, 8 prompts of 1024 tokens on a v6e: 611 instead of 814 MB of temporaries).
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1).astype(jnp.float32)
    return (wide * cos + turned * sin).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Default:
    """Su et al. 2021 (arXiv:2104.09864)."""

    rope_theta: float
    head_dim: int

    def inverse_frequencies(self, length: jax.Array | int) -> np.ndarray:
        del length
        return 1 / _powers(self.rope_theta, self.head_dim)

    def attention_scaling(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear:
    """All positions divided by a factor."""

    rope_theta: float
    head_dim: int
    factor: float

    def inverse_frequencies(self, length: jax.Array | int) -> np.ndarray:
        del length
        return 1 / _powers(self.rope_theta, self.head_dim) / np.float32(self.factor)

    def attention_scaling(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """NTK scaling: the base grows with the longest row beyond `max_position_embeddings`."""

    rope_theta: float
    head_dim: int
    max_position_embeddings: int
    factor: float

    def inverse_frequencies(self, length: jax.Array | int) -> jax.Array:
        longest = jnp.maximum(length, self.max_position_embeddings).astype(jnp.float32)
        growth = self.factor * longest / self.max_position_embeddings - (self.factor - 1)
        return 1 / _powers(self.rope_theta * growth ** (self.head_dim / (self.head_dim - 2)), self.head_dim)

    def attention_scaling(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Peng et al. 2023 (arXiv:2309.00071): interpolates slow dimensions, keeps fast ones, with a ramp in between."""

    rope_theta: float
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def inverse_frequencies(self, length: jax.Array | int) -> np.ndarray:
        del length
        low, high = self._turning_dim(self.beta_fast), self._turning_dim(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # as in transformers, against a division by zero
        # 0 in the dimensions up to `low`, which turn often; 1 from `high` on.
        ramp = np.clip((np.arange(self.head_dim // 2) - low) / (high - low), 0, 1).astype(np.float32)
        powers = _powers(self.rope_theta, self.head_dim)
        return 1 / (np.float32(_extension(self)) * powers) * ramp + 1 / powers * (1 - ramp)

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        # DeepSeek's two keys; for all others the paper's formula.
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1)

    def _turning_dim(self, turns: float) -> float:
        """The dimension, as a float, that makes this number of turns in the original context."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return self.head_dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(_extension(self)) + 1 if _extension(self) > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """Ding et al. 2024 (arXiv:2402.13753): one list of factors within the original context, another beyond it."""

    rope_theta: float
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float | None = None
    attention_factor: float | None = None

    def inverse_frequencies(self, length: jax.Array | int) -> jax.Array:
        powers = _powers(self.rope_theta, self.head_dim)
        short, long = (
            1 / (np.array(factors, np.float32) * powers) for factors in (self.short_factor, self.long_factor)
        )
        return jnp.where(length > self.original_max_position_embeddings, long, short)

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if _extension(self) <= 1:
            return 1.0
        return math.sqrt(1 + math.log(_extension(self)) / math.log(self.original_max_position_embeddings))


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1: divides slow frequencies by the factor, keeps fast ones, and interpolates in between."""

    rope_theta: float
    head_dim: int
    original_max_position_embeddings: int
    factor: float
    low_freq_factor: float
    high_freq_factor: float

    def inverse_frequencies(self, length: jax.Array | int) -> np.ndarray:
        del length
        kept = 1 / _powers(self.rope_theta, self.head_dim)
        divided = kept / np.float32(self.factor)
        turns = self.original_max_position_embeddings * kept / np.float32(2 * math.pi)  # in the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        interpolated = (1 - smooth) * divided + smooth * kept
        slow, fast = turns < self.low_freq_factor, turns > self.high_freq_factor
        return np.where(slow, divided, np.where(fast, kept, interpolated)).astype(np.float32)

    def attention_scaling(self) -> float:
        return 1.0


TYPES: dict[str, type[Any]] = {
    "default": Default,
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "llama3": Llama3,
}
_DEFAULT_THETA = 10000.0
_SPELLINGS = ("rope_parameters", "rope_scaling")
# Not reported as unread: types without scaling have no use for the original context, and `partial_rotary_factor` is
# checked by itself.
_READ_WITH_ANY_TYPE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")


def _powers(theta: jax.Array | float, head_dim: int) -> Any:  # an array of NumPy, or of JAX if theta is one
    """float32 [H/2]: theta ** (2i / H)."""
    return theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def _extension(rope: Yarn | LongRope) -> float:
    """The context length divided by the original context length."""
    return rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings


def from_config(raw: Mapping[str, Any], head_dim: int) -> Rope:
    """Reads the rotary parameters of a `config.json`, in the spelling of transformers 4 or 5.

    transformers 4 wrote `rope_theta` next to `rope_scaling`, 5 writes both into `rope_parameters`. If a config has both
    spellings, they must agree: if only one of them were read, scaling could be lost silently.

    Raises:
        ValueError: on an unknown type, a missing key, or two spellings that disagree.
    """
    spellings = [name for name in _SPELLINGS if raw.get(name)]
    # Frozen dataclasses, so that equal ones are one element of the set.
    ropes = {_from_parameters(raw, name, raw[name], head_dim) for name in spellings}
    if len(ropes) > 1:
        raise ValueError(
            f"config.json holds `rope_parameters`={raw['rope_parameters']!r} and `rope_scaling`="
            f"{raw['rope_scaling']!r}, which disagree. Remove the one that is wrong."
        )
    return ropes.pop() if ropes else _from_parameters(raw, "rope_parameters", {}, head_dim)


def to_config(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of a config.json, in the spelling of transformers 5."""
    name = next(name for name, kind in TYPES.items() if isinstance(rope, kind))
    given = {key: value for key, value in vars(rope).items() if value is not None}
    return {"rope_type": name} | {k: v for k, v in given.items() if k not in ("head_dim", "max_position_embeddings")}


def unread_keys(raw: Mapping[str, Any]) -> list[str]:
    """The rotary parameters of a `config.json` that its `rope_type` does not read, such as "rope_scaling.attn_factor".

    Raises:
        ValueError: on an unknown type, or on parameters for each kind of layer.
    """
    found = []
    for name in [name for name in _SPELLINGS if raw.get(name)] or [""]:
        rope_type, given = _type_and_values(name, raw.get(name) or {})
        if given.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
            key = "partial_rotary_factor"
            if rope_type != "default":
                raise ValueError(
                    f"`{key}` of config.json rotates only a part of each head, which transformers cannot do in this "
                    f"family with `rope_type`={rope_type!r} either. Remove it."
                )
            found.append(f"{name}.{key}" if key in given else key)
        known = {*_READ_WITH_ANY_TYPE, *(field.name for field in fields(TYPES[rope_type]))}
        for key in [key for key in given if key not in known]:
            if isinstance(given[key], Mapping):
                raise ValueError(
                    f"`{name}`={raw[name]!r:.200} of config.json has separate parameters for each kind of layer, which "
                    "jaxgen does not implement."
                )
            if given[key]:
                found.append(f"{name}.{key}")
    return [*dict.fromkeys(found)]


def _type_and_values(name: str, parameters: object) -> tuple[str, dict[str, Any]]:
    """The `rope_type` of rotary parameters, and their other keys with a value."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"`{name}`={parameters!r} of config.json must be an object of rotary parameters.")
    given = {key: value for key, value in parameters.items() if value is not None}
    rope_type = given.pop("rope_type", given.get("type", "default"))
    if given.pop("type", rope_type) != rope_type:
        raise ValueError(
            f"`{name}` of config.json has both `type` and `rope_type`, and they differ: {parameters!r}. Remove one."
        )
    if str(rope_type) not in TYPES:
        raise ValueError(f"`rope_type`={rope_type!r} in config.json is not supported; it may be one of {list(TYPES)}.")
    return rope_type, given


def _from_parameters(raw: Mapping[str, Any], name: str, parameters: object, head_dim: int) -> Rope:
    """The rope of one spelling. Keys that it lacks may be at the top level of the config.

    Raises:
        ValueError: if a key is missing, is not valid, or has another value at the top level.
    """
    rope_type, given = _type_and_values(name, parameters)
    # Without its own key, the original context is the whole context.
    longest = raw["max_position_embeddings"]
    original = given.get("original_max_position_embeddings", raw.get("original_max_position_embeddings")) or longest
    values = given | {
        "rope_theta": given.get("rope_theta", raw.get("rope_theta", _DEFAULT_THETA)),
        "head_dim": head_dim,
        "max_position_embeddings": longest,
        "original_max_position_embeddings": original,
    }
    for key in ("rope_theta", "original_max_position_embeddings"):
        # A key may stand at the top level, beside the parameters, or in both places with one value.
        if (raw.get(key) or values[key]) != values[key]:
            raise ValueError(
                f"config.json has `{key}`={raw[key]!r} beside `{name}` with {values[key]!r}. Remove the wrong one."
            )
    required = {field.name: field.default is MISSING for field in fields(TYPES[rope_type])}
    if missing := [key for key in required if required[key] and key not in values]:
        raise ValueError(f"`{name}` of config.json lacks {missing}, which `rope_type`={rope_type!r} needs.")
    checked = {key: _checked(key, values[key], head_dim) for key in required if key in values}
    return TYPES[rope_type](**checked | {"rope_theta": float(checked["rope_theta"])})


def _checked(key: str, value: Any, head_dim: int) -> Any:
    """The value of a rotary parameter: a positive number, a flag, or one positive number per pair of dimensions."""
    # The only flag. JSON tells true from 1, and so does `type` below.
    if key == "truncate" and isinstance(value, bool):
        return value
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(type(number) not in (int, float) or not 0 < number < 1e30 for number in numbers):
        raise ValueError(f"`{key}`={value!r} in the rotary parameters of config.json must be positive and finite.")
    per_pair = key in ("short_factor", "long_factor")
    if per_pair != isinstance(value, list | tuple) or (per_pair and len(value) != head_dim // 2):
        wanted = f"{head_dim // 2} numbers, half of `head_dim`={head_dim}" if per_pair else "one number"
        raise ValueError(f"`{key}`={value!r} in the rotary parameters of config.json must be {wanted}.")
    return tuple(value) if per_pair else value

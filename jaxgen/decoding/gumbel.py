"""Gumbel noise for sampling: after adding it to log-probabilities, the argmax is a sample (Gumbel-max).

The k highest sums are k samples without replacement, in the order in which they are drawn (Vieira 2014).
"""

import jax
import jax.numpy as jnp


def row_keys(key: jax.Array, prompts: int, copies: int) -> jax.Array:
    """uint32 [prompts * copies, 2]: the key of each row; see `Sample.key`. Keys of any kind become Threefry keys."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(key)
    elif key.dtype == jnp.uint32 and key.ndim and key.shape[-1] in (2, 4):
        words = key
    elif not jnp.issubdtype(key.dtype, jnp.integer):
        raise ValueError(f"`key` has dtype {key.dtype}. Pass an int, a jax.random key, or one of either per prompt.")
    else:  # an int becomes its high and its low word, as on the host; ints of 32 bits are sign-extended
        high = key >> 32 if key.dtype.itemsize > 4 else jnp.where(key < 0, -1, 0)
        words = jnp.stack([high.astype(jnp.uint32), key.astype(jnp.uint32)], axis=-1)
    # Keys of other generators have 4 words, of which the first 2 are used.
    base = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    fold = jax.random.fold_in
    # A prompt with its own key gets the samples of a batch of one, wherever it is in the batch.
    indices = jnp.arange(prompts) if base.ndim == 0 else jnp.zeros(prompts, jnp.int32)
    by_prompt = jax.vmap(fold, (None if base.ndim == 0 else 0, 0))(base, indices)
    by_row = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(by_prompt, jnp.arange(copies))
    return jax.random.key_data(by_row).reshape(-1, 2)


def gumbel(keys: jax.Array, step: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for each of `token_ids`, float32, with a Threefry block for each key, step and token id.

    Args:
        keys: uint32 [N, 2].
        step: int32 []. The number of tokens generated so far.
        token_ids: int32 [N, W], or for beams [B, C, V]: indices into C * V.
    """
    key_0, key_1 = (keys[:, word].reshape(-1, *[1] * (token_ids.ndim - 1)) for word in (0, 1))
    bits = _threefry(key_0, key_1, step.astype(jnp.uint32), token_ids.astype(jnp.uint32))
    # The largest noise decides, so it comes from the smallest `uniform`, where float32 has the most values. At 1 the
    # noise would be -inf.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _threefry(key_0: jax.Array, key_1: jax.Array, counter_0: jax.Array, counter_1: jax.Array) -> jax.Array:
    """uint32: the first word of Threefry-2x32 with 20 rounds (Salmon et al. 2011). The arguments broadcast.

    Same bits as jax's primitive, whose rolled loops XLA:CPU does not fuse: 18 times slower for 8 x 128k.
    """
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(0x1BD11BDA))
    a, b = counter_0 + key_0, counter_1 + key_1
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = (b << jnp.uint32(distance) | b >> jnp.uint32(32 - distance)) ^ a
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return a

"""Teaches the bundled model to tell friendlier stories: reinforcement learning (GRPO) in one jitted step.

A story is worth the number of different friendly words in it. Rollouts, rewards, advantages, loss and update are one
compiled program. Sampling and loss run the same model: there is no second engine to hand the weights to, and the
log-probabilities of the rollout are those that the loss computes.

    python examples/grpo.py        half a minute on one CPU core
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from transformers import AutoTokenizer

import jaxgen

PROMPTS = ["Once upon a time", "One day, a small fox", "Near a quiet river", "On a farm"]
FRIENDLY = (
    "best better brave cheerful friends good happily happy help helped kind laughed loved played playing sang smiled "
    "song sunny together"
).split()

GROUP = 8  # continuations of each prompt, which are compared with one another
NEW_TOKENS = 48
CLIP = 0.2
LEARNING_RATE = 5e-4

Model = Callable[..., jax.Array]  # int32 [N, T] ids, bool [N, T] mask -> float32 [N, T, V] logits; itself a pytree


def main() -> None:
    args = _arguments()
    train(args.steps, args.seed)


def train(steps: int, seed: int) -> list[dict[str, Any]]:
    """Takes `steps` steps, prints how they go, and returns what `train_step` reports of each."""
    model = jaxgen.load(jaxgen.BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL)
    # The arguments of `generate`, checked and padded once, on the host. Raw samples (`top_k=0`): the loss is about the
    # model's own distribution. No eos, so that every continuation has the same length and the loss needs no mask.
    call = jaxgen.prepare(
        model,
        **tokenizer(PROMPTS, padding=True, return_tensors="np"),
        do_sample=True,
        top_k=0,
        num_return_sequences=GROUP,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logprobs=True,
    )
    # After a space, as inside a sentence, each of these words is one token.
    words = tokenizer([f" {word}" for word in FRIENDLY], add_special_tokens=False, return_tensors="np").input_ids[:, 0]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
    step = jax.jit(partial(train_step, call, partial(count_words, words), optimizer.update))

    state = optimizer.init(model)
    key = jax.random.key(seed)
    reports = []
    for number in range(steps):
        model, state, report = step(model, state, jax.random.fold_in(key, number))
        reports.append(jax.device_get(report))
        print(f"step {number:3}  reward {report['reward']:5.2f}  {'#' * round(10 * report['reward'])}")
    error = reports[0]["ratio_error"]
    print(f"\nFirst step: the ratio of the loss's probabilities to the rollout's is 1 to within {error:.1e}.")
    for name, report in ("Before", reports[0]), ("After", reports[-1]):
        print(f"\n{name}: {tokenizer.decode(report['story'], skip_special_tokens=True)}")
    return reports


def train_step(
    call: jaxgen.Call, reward: Callable, update: Callable, model: Model, state: optax.OptState, key: jax.Array
) -> tuple[Model, optax.OptState, dict[str, jax.Array]]:
    """Returns the model and the optimizer state after one step, and a report of its rollouts."""
    rollout = jaxgen.decode(model, replace(call, strategy=replace(call.strategy, key=key)))
    # `decode` works on padded shapes; `generate` would trim them on the host, here it is two slices.
    prompts, length = int(call.prompt.rows), int(call.prompt.length)
    rows = prompts * GROUP
    sequences = rollout["sequences"][:rows, : length + NEW_TOKENS]
    old_logprobs = rollout["logprobs"][:rows, :NEW_TOKENS]
    prompt_mask = jnp.repeat(call.prompt.attention_mask[:prompts, -length:], GROUP, axis=0)
    mask = jnp.pad(prompt_mask, ((0, 0), (0, NEW_TOKENS)), constant_values=True)

    rewards = reward(sequences[:, length:])
    groups = rewards.reshape(-1, GROUP)
    # How much better than the average of the same prompt: the group takes the place of a learned value function.
    advantages = (groups - groups.mean(axis=1, keepdims=True)) / (groups.std(axis=1, keepdims=True) + 1e-4)

    loss = partial(policy_loss, sequences=sequences, mask=mask, old=old_logprobs, advantages=advantages.reshape(-1, 1))
    gradients, ratio = jax.grad(loss, has_aux=True)(model)
    updates, state = update(gradients, state, model)
    report = {"reward": rewards.mean(), "ratio_error": jnp.abs(ratio - 1).max(), "story": sequences[0]}
    return optax.apply_updates(model, updates), state, report


def policy_loss(
    model: Model, sequences: jax.Array, mask: jax.Array, old: jax.Array, advantages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate of PPO, averaged over the new tokens, and its probability ratios [N, NEW_TOKENS].

    With one update per rollout the ratios are 1; the clip is for those who take several.
    """
    logits = model(sequences, mask)[:, -NEW_TOKENS - 1 : -1]
    new = -optax.softmax_cross_entropy_with_integer_labels(logits, sequences[:, -NEW_TOKENS:])
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.minimum(ratio * advantages, clipped * advantages).mean(), ratio


def count_words(words: jax.Array, tokens: jax.Array) -> jax.Array:
    """The reward, float32 [N]: how many of the int32 [W] words occur in each row of int32 [N, T] tokens."""
    return (tokens[:, :, None] == words).any(axis=1).sum(axis=1).astype(jnp.float32)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach the bundled model to tell friendlier stories, with GRPO.")
    parser.add_argument("--steps", type=int, default=50, help="number of rollouts and updates")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    return parser.parse_args()


if __name__ == "__main__":
    main()

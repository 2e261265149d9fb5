"""Trains the tiny Llama that ships with jaxgen, from nothing: corpus, tokenizer, model, card.

The corpus is told by the grammar in `stories.py`, so everything follows from the seed and nothing is downloaded. The
result is an ordinary Hugging Face folder that `jaxgen.load` and `transformers` both read.

    python examples/train_stories.py --output stories        about 20 minutes on two CPU cores
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stories import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast

import jaxgen

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # ids 0, 1 and 2

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ROWS, COLUMNS = 4, 193  # of a batch; the few stories that are longer lose their ends
HELD_OUT_BATCHES = 100

Model = Callable[[jax.Array], jax.Array]  # int32 [N, T] input ids -> float32 [N, T, V] logits; itself a pytree


def main() -> None:
    args = _arguments()
    begin = time.monotonic()
    # One endless stream of stories: some for the tokenizer, some set aside, all that follow for training, once each.
    told = stories(args.seed)
    tokenizer = train_tokenizer(itertools.islice(told, 10_000))
    batches = encode(told, tokenizer)
    held_out = list(itertools.islice(batches, HELD_OUT_BATCHES))
    model = jaxgen.from_config(CONFIG, key=args.seed, dtype="float32")
    model = train(model, batches, args.steps)
    loss = float(np.mean([jax.jit(next_token_loss)(model, batch) for batch in held_out]))
    minutes = (time.monotonic() - begin) / 60
    print(f"held-out loss {loss:.4f} nats/token after {minutes:.1f} minutes")

    jaxgen.save(model, args.output)
    tokenizer.save_pretrained(args.output)
    story = tell(model, tokenizer, "Once upon a time")
    (args.output / "README.md").write_text(card(model, loss, args.steps, minutes, story), encoding="utf-8")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: any text can be encoded, and the frequent words of the stories become one token each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, CONFIG["bos_token_id"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=CONFIG["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(told: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    """Yields int32 [N, T + 1] batches: in each row one story from its bos to its eos, then padding.

    Stories are not packed end to end: one that saw the names of another would learn far later to keep to its own.
    """
    while True:
        texts = [story + EOS for story in itertools.islice(told, ROWS)]
        rows = tokenizer(texts, padding="max_length", max_length=COLUMNS, truncation=True, padding_side="right")
        yield np.array(rows.input_ids, np.int32)


def train(model: Model, batches: Iterator[np.ndarray], steps: int) -> Model:
    """Takes `steps` steps of AdamW, one batch each, with a warmup and a cosine decay of the learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    step = jax.jit(partial(train_step, optimizer.update))
    state = optimizer.init(model)
    progress = trange(steps, desc="training", mininterval=1.0)
    for _ in progress:
        model, state, loss = step(model, state, next(batches))
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return model


def train_step(
    update: Callable, model: Model, state: optax.OptState, batch: jax.Array
) -> tuple[Model, optax.OptState, jax.Array]:
    """Returns the model and the optimizer state after one step, and the loss before it."""
    loss, gradients = jax.value_and_grad(next_token_loss)(model, batch)
    updates, state = update(gradients, state, model)
    return optax.apply_updates(model, updates), state, loss


def next_token_loss(model: Model, batch: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, in nats per token, of an int32 [N, T + 1] batch without its padding."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
    return jnp.mean(losses, where=targets != CONFIG["pad_token_id"])


def tell(model: Model, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Continues the prompt greedily, to the end of the story."""
    inputs = tokenizer(prompt, return_tensors="np")
    sequences = jaxgen.generate(model, **inputs, max_new_tokens=256)
    return tokenizer.decode(sequences[0], skip_special_tokens=True)


def card(model: Model, loss: float, steps: int, minutes: float, story: str) -> str:
    """Returns the text of the model card."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [llama, jax]
---

# Stories

A very small Llama ({parameters:,} parameters) that tells short children's stories. It ships with jaxgen so that
examples and tests have a real, trained checkpoint at hand; it is of no use beyond that.

- **Architecture**: `LlamaForCausalLM`, {CONFIG["num_hidden_layers"]} layers, hidden size {CONFIG["hidden_size"]}, \
{CONFIG["num_attention_heads"]} heads over {CONFIG["num_key_value_heads"]} key-value heads, tied embeddings, float32.
- **Tokenizer**: byte-level BPE with {CONFIG["vocab_size"]} tokens, trained on the same text; it prepends \
`{BOS}` and pads on the left.
- **Data**: English stories told by a grammar, `examples/stories.py`; no other text, and nobody's data.
- **Training**: {steps * ROWS:,} stories, each seen once, in {minutes:.0f} minutes on two CPU cores:
  `python examples/train_stories.py --output stories --steps {steps}`
- **Held-out loss**: {loss:.4f} nats/token, a perplexity of {np.exp(loss):.3f}, on stories set aside before training.
- **Limits**: it knows the words and the plots of the grammar and nothing else.

The greedy continuation of "Once upon a time":

> {story}
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny story-telling Llama that ships with jaxgen.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--steps", type=int, default=12_000, help="number of optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stories and of the initial weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()

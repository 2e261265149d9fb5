"""Trains the tiny T5 that ships with jaxgen, from nothing: it corrects the spelling of the stories' sentences.

Its corpus are the sentences of the grammar in `stories.py`, each with misspelt words as the source and as it was as the
text. The tokenizer is that of the stories. The result is an ordinary Hugging Face folder that `jaxgen.load` and
`transformers` both read.

    python examples/train_speller.py --output speller        about 40 minutes on two CPU cores
"""

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stories import stories
from tokenizers import processors
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import jaxgen

PAD, EOS = 0, 2  # of the stories' tokenizer

CONFIG = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 1024,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
}

ROWS, SOURCE_COLUMNS, TEXT_COLUMNS = 32, 40, 24  # of a batch; longer sentences are left out
HELD_OUT_BATCHES = 20

Batch = tuple[np.ndarray, np.ndarray]  # int32 [B, X] sources and [B, T + 1] texts, from the start token to the eos


def main() -> None:
    args = _arguments()
    begin = time.monotonic()
    tokenizer = speller_tokenizer()
    batches = encode(pairs(args.seed), tokenizer)
    held_out = list(itertools.islice(batches, HELD_OUT_BATCHES))
    model = jaxgen.from_config(CONFIG, key=args.seed)
    model = train(model, batches, args.steps)
    accuracy = corrected(model, held_out)
    minutes = (time.monotonic() - begin) / 60
    print(f"{accuracy:.1%} of the held-out sentences are corrected without a mistake, after {minutes:.1f} minutes")

    jaxgen.save(model, args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "README.md").write_text(card(model, accuracy, args.steps, minutes), encoding="utf-8")


def speller_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the stories, which ends every text with an eos, as that of a T5 does."""
    tokenizer = AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        pair=f"$A $B {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, EOS)],
    )
    tokenizer.padding_side = "right"
    return tokenizer


def pairs(seed: int) -> Iterator[tuple[str, str]]:
    """Sentences without end: with misspelt words, and as they were."""
    rng = random.Random(seed)
    for story in stories(seed):
        for sentence in re.findall(r"\"?[A-Z][^.!?]*[.!?]\"?", story):
            yield misspelt(sentence, rng), sentence


def misspelt(sentence: str, rng: random.Random) -> str:
    """The sentence with a mistake in about every third word."""
    return re.sub(r"[A-Za-z]{3,}", lambda word: _mistake(word[0], rng) if rng.random() < 0.35 else word[0], sentence)


def _mistake(word: str, rng: random.Random) -> str:
    """The word with a letter left out, doubled, exchanged with the next, or replaced by another vowel."""
    place = rng.randrange(len(word) - 1)
    letter, following = word[place], word[place + 1]
    kinds = [following, letter * 2 + following, following + letter]
    if letter in "aeiou":
        kinds += [rng.choice("aeiou") + following] * 2
    return word[:place] + rng.choice(kinds) + word[place + 2 :]


def encode(told: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Yields batches of `ROWS` pairs, padded on the right."""
    while True:
        sources, texts = (np.full((ROWS, width), PAD, np.int32) for width in (SOURCE_COLUMNS, TEXT_COLUMNS + 1))
        row = 0
        while row < ROWS:
            wrong, right = (tokenizer(text).input_ids for text in next(told))
            if len(wrong) <= SOURCE_COLUMNS and len(right) <= TEXT_COLUMNS:
                sources[row, : len(wrong)] = wrong
                texts[row, 1 : len(right) + 1] = right  # column 0 is the start token, which is the padding's
                row += 1
        yield sources, texts


def train(model: Any, batches: Iterator[Batch], steps: int) -> Any:
    """Takes `steps` steps of AdamW, one batch each, with a warmup and a cosine decay of the learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(model: Any, state: optax.OptState, batch: Batch):
        loss, gradients = jax.value_and_grad(text_loss)(model, batch)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, loss

    state = optimizer.init(model)
    progress = trange(steps, desc="training", mininterval=1.0)
    for number in progress:
        model, state, loss = step(model, state, next(batches))
        if number % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return model


def text_loss(model: Any, batch: Batch) -> jax.Array:
    """Returns the mean cross-entropy of the texts, in nats per token, given their sources."""
    sources, texts = batch
    inputs, targets = texts[:, :-1], texts[:, 1:]
    logits = model(sources, sources != PAD, decoder_input_ids=inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses, where=targets != PAD)


def corrected(model: Any, batches: list[Batch]) -> float:
    """The share of sentences that beam search corrects without a mistake."""
    right = []
    for sources, texts in batches:
        found = jaxgen.generate(model, sources, attention_mask=sources != PAD, num_beams=4, max_new_tokens=TEXT_COLUMNS)
        found = np.pad(found, ((0, 0), (0, texts.shape[1] - found.shape[1])))
        ended = np.cumsum(texts == EOS, axis=1) - (texts == EOS) > 0  # after the eos, beams are filled with more of it
        right += ((found == texts) | ended).all(axis=1).tolist()
    return float(np.mean(right))


def card(model: Any, accuracy: float, steps: int, minutes: float) -> str:
    """Returns the text of the model card."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text2text-generation
tags: [t5, jax]
---

# Speller

A very small T5 ({parameters:,} parameters) that corrects the spelling of sentences from short children's stories. It
ships with jaxgen so that examples and tests have a real, trained encoder-decoder at hand; it is of no use beyond that.

- **Architecture**: `T5ForConditionalGeneration`, {CONFIG["num_layers"]} + {CONFIG["num_decoder_layers"]} layers, \
hidden size {CONFIG["d_model"]}, {CONFIG["num_heads"]} heads, tied embeddings, float32.
- **Tokenizer**: that of the stories, with an eos after each text and padding on the right.
- **Data**: sentences told by a grammar, `examples/stories.py`, with mistakes in about every third word.
- **Training**: {steps * ROWS:,} sentences in {minutes:.0f} minutes on two CPU cores:
  `python examples/train_speller.py --output speller --steps {steps}`
- **Accuracy**: {accuracy:.1%} of sentences set aside before training are corrected without a mistake, with 4 beams.
- **Limits**: it knows the words of the grammar and nothing else.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny spelling corrector that ships with jaxgen.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--steps", type=int, default=8_000, help="number of optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sentences and of the initial weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""An assistant model drafts: the tokens are those of the call without it, and a good assistant saves passes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import architecture, family_member
from prepared import prepared
from random_calls import PROCESSORS, WARPERS, call, some

import jaxgen
from jaxgen.base import Prompt, RaggedCache
from jaxgen.decoding.assistant import MOST_PIECES, Assistant, AssistantMemory, Translation
from jaxgen.decoding.drafters import Choose, Draft, Drafter, Texts
from jaxgen.generation.running import driver
from jaxgen.generation.running.driver import UNWATCHED, collect, drive
from jaxgen.pytree import pytree

COMBINATIONS, CALLS_EACH = 20, 25
USUAL, USUAL_CALLS = 2, 3  # the others are for sweeps
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logprobs": True}
PROMPTS = np.array([[5, 9, 17, 4, 8, 11], [0, 0, 7, 12, 3, 19], [0, 6, 13, 5, 9, 14]])
MASK = (PROMPTS != 0).astype(int)
CALL: dict[str, Any] = {"attention_mask": MASK, "eos_token_id": None, "max_new_tokens": 25}
SURE = {"assistant_confidence_threshold": 0.0}


def perturbed(model: Any, share: float) -> Any:
    """A copy of the model with noise in its weights."""
    leaves, treedef = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    noisy = [leaf + share * np.std(leaf) * rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def garbage(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Any:
    """A model of the same shape with other weights."""
    return jaxgen.from_config(model.config.to_json(), key=99)


@pytest.fixture
def tiny_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that are full after a few steps, so that holes are squeezed out and slots added all the time."""
    monkeypatch.setattr(driver, "_FEWEST_SLOTS", 1)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return jaxgen.load(architecture(1).write(tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def assistants(two_layers: Any) -> list[dict[str, Any]]:
    """The model itself, nearly the model, another one, one whose vocabulary is padded further, and a part of it."""
    config = two_layers.config.to_json()
    padded = jaxgen.from_config({**config, "vocab_size": config["vocab_size"] + 7}, key=3)
    others = (two_layers, perturbed(two_layers, 0.1), jaxgen.from_config(config, key=99), padded)
    return [*({"assistant_model": each} for each in others), {"assistant_early_exit": 1}]


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize(
    ("seed", "calls"),
    [
        *((seed, USUAL_CALLS) for seed in range(USUAL)),
        *(pytest.param(seed, CALLS_EACH, marks=pytest.mark.sweep) for seed in range(COMBINATIONS)),
    ],
)
def test_whatever_the_assistant_tokens_and_logprobs_are_those_of_the_plain_call(
    seed: int, calls: int, two_layers: Any, assistants: list[dict[str, Any]], tiny_caches: None
) -> None:
    """And those of a call that goes on from its cache."""
    rng = np.random.default_rng(seed)
    names = some(rng, PROCESSORS, 0, 3)
    samples = bool(seed % 2)
    names += some(rng, WARPERS, 0, 3) if samples else []
    copies, rows = int(rng.choice([1, 3])) if samples else 1, int(rng.choice([1, 2, 3, 5]))
    # These decide which programs there are.
    schedule = {"num_assistant_tokens_schedule": ["constant", "heuristic"][seed // 2 % 2]}
    assistant = assistants[seed % len(assistants)] | schedule
    least = int(rng.choice([1, 2, 4, 12]))
    for number in range(calls):
        ids, keywords = call(rng, names)
        mask = keywords["attention_mask"]
        ids, mask = (np.concatenate([each, each])[:rows] for each in (ids, mask))
        keywords |= {**OUTPUTS, "do_sample": samples, "num_return_sequences": copies, "key": seed + number}
        keywords["attention_mask"] = mask
        plain = jaxgen.generate(two_layers, ids, **keywords)
        drafts = {
            **assistant,
            "num_assistant_tokens": least if least < 4 else least + int(rng.integers(4)),
            "assistant_confidence_threshold": float(rng.choice([0.0, 0.1, 0.4])),
        }
        ours = jaxgen.generate(two_layers, ids, **drafts, **keywords)
        message = str((names, drafts, keywords))
        np.testing.assert_array_equal(ours.sequences, plain.sequences, err_msg=message)
        np.testing.assert_allclose(ours.logprobs, plain.logprobs, atol=2e-4, err_msg=message)
        longer = np.concatenate([plain.sequences, rng.integers(3, 20, (len(plain.sequences), 2))], axis=1)
        mask = np.repeat(mask, copies, axis=0)
        mask = np.pad(mask, ((0, 0), (0, longer.shape[1] - mask.shape[1])), constant_values=1)
        on = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "do_sample": samples, "key": 1}
        expected = jaxgen.generate(two_layers, longer, cache=plain.cache, **on)
        again = jaxgen.generate(two_layers, longer, cache=ours.cache, **drafts, **on)
        np.testing.assert_array_equal(again, expected, err_msg=message)


# ---- How many passes ----


@pytest.mark.parametrize("samples", [False, True])
def test_the_model_as_its_own_assistant_is_always_right(samples: bool, model: Any, tiny_caches: None) -> None:
    keywords = {**CALL, "do_sample": samples, "key": 5, "return_dict_in_generate": True}
    plain = jaxgen.generate(model, PROMPTS, **keywords)
    ours = jaxgen.generate(model, PROMPTS, assistant_model=model, num_assistant_tokens=3, **SURE, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    # The pass over the prompt chooses one token, and each later one a draft of 3 and one more.
    np.testing.assert_array_equal(ours.rounds, 1 + 24 // 4)
    np.testing.assert_array_equal(ours.accepted, ours.drafted)
    np.testing.assert_array_equal(ours.drafted, 18)
    # Caches grow in step.
    long = {**CALL, "max_new_tokens": 97, "return_dict_in_generate": True}
    assert set(
        jaxgen.generate(model, PROMPTS, assistant_model=model, num_assistant_tokens=3, **SURE, **long).rounds
    ) == {25}
    # 20 tokens and one more, of which the last pass needs 2.
    ours = jaxgen.generate(model, PROMPTS, assistant_model=model, **SURE, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    np.testing.assert_array_equal([ours.rounds, ours.drafted, ours.accepted], [[3] * 3, [22] * 3, [22] * 3])


def test_a_wrong_assistant_costs_no_passes(model: Any, garbage: Any) -> None:
    keywords = {**CALL, "return_dict_in_generate": True}
    plain = jaxgen.generate(model, PROMPTS, **keywords)
    ours = jaxgen.generate(model, PROMPTS, assistant_model=garbage, num_assistant_tokens=3, **SURE, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    np.testing.assert_array_equal(ours.rounds + ours.accepted, 25)
    assert ours.accepted.max() < 4


def test_a_batch_takes_as_many_passes_as_its_slowest_row_alone(model: Any, tiny_caches: None) -> None:
    assistant = perturbed(model, 0.2)
    options = {"assistant_model": assistant, "num_assistant_tokens": 3, **SURE, "return_dict_in_generate": True}
    together = jaxgen.generate(model, PROMPTS, **CALL, **options)
    alone = [
        jaxgen.generate(model, PROMPTS[row : row + 1], **{**CALL, "attention_mask": MASK[row : row + 1]}, **options)
        for row in range(3)
    ]
    np.testing.assert_array_equal(together.rounds, [each.rounds[0] for each in alone])
    assert len({*together.rounds.tolist()}) > 1
    assert 7 < together.rounds.max() < 25


def test_drafts_are_what_the_assistant_says_after_the_text_so_far(model: Any, tiny_caches: None) -> None:
    """Also where drafted tokens were dropped before: nothing of them is left in its cache."""
    assistant = perturbed(model, 0.2)
    call = {"max_new_tokens": 25, "eos_token_id": None}
    whole = jaxgen.generate(model, PROMPTS[:1], **call)[0]
    length, rounds, drafted, accepted = PROMPTS.shape[1] + 1, 1, 0, 0
    while length < len(whole):
        wanted = min(3, len(whole) - length - 1)
        text = np.pad(whole[:length], (40 - length, 0))[None]
        mask = (np.arange(40) >= 40 - length).astype(int)[None]
        draft = jaxgen.generate(assistant, text, attention_mask=mask, max_new_tokens=3, eos_token_id=None)[0, 40:]
        agrees = draft[:wanted] == whole[length : length + wanted]
        agreed = int(np.cumprod(agrees).sum())
        length, rounds, drafted, accepted = length + agreed + 1, rounds + 1, drafted + wanted, accepted + agreed
    assert 8 < rounds < 24
    ours = jaxgen.generate(
        model,
        PROMPTS[:1],
        assistant_model=assistant,
        num_assistant_tokens=3,
        return_dict_in_generate=True,
        **SURE,
        **call,
    )
    assert [int(each[0]) for each in (ours.rounds, ours.drafted, ours.accepted)] == [rounds, drafted, accepted]


def test_an_unsure_token_ends_a_draft(model: Any) -> None:
    """With a threshold of 1 no token is sure, and a draft has one token."""
    ours = jaxgen.generate(
        model,
        PROMPTS,
        assistant_model=model,
        num_assistant_tokens=3,
        assistant_confidence_threshold=1.0,
        return_dict_in_generate=True,
        **CALL,
    )
    np.testing.assert_array_equal(ours.rounds, 1 + 24 // 2)
    np.testing.assert_array_equal(ours.drafted, ours.rounds - 1)


def test_a_schedule_drafts_more_after_a_draft_that_stayed_and_less_after_another(model: Any, garbage: Any) -> None:
    def drafted(assistant: Any, num_tokens: int) -> list[int]:
        ours = jaxgen.generate(
            model,
            PROMPTS[:1],
            max_new_tokens=25,
            eos_token_id=None,
            assistant_model=assistant,
            num_assistant_tokens=num_tokens,
            num_assistant_tokens_schedule="heuristic",
            return_dict_in_generate=True,
            **SURE,
        )
        return [int(ours.rounds[0]), int(ours.drafted[0])]

    # 2, 4, 6, and then 7, which is twice the first rounded up; 1 + 3 + 5 + 7 + 8 tokens, and then the one that is left.
    assert drafted(model, 2) == [6, 2 + 4 + 6 + 7]
    # 3, 2, 1, 1, ... of which none is right.
    plain = jaxgen.generate(model, PROMPTS[:1], max_new_tokens=25, eos_token_id=None, return_dict_in_generate=True)
    assert plain.sequences.shape[1] == 31
    rounds, count = drafted(garbage, 3)
    assert rounds > 20
    assert count < 24 + 3 + 10


def test_a_draft_ends_with_its_eos(model: Any) -> None:
    free = jaxgen.generate(model, PROMPTS[:1], max_new_tokens=25, eos_token_id=None)
    eos = int(free[0, PROMPTS.shape[1] + 2])
    first = [*free[0, PROMPTS.shape[1] :]].index(eos)
    ours = jaxgen.generate(
        model,
        PROMPTS[:1],
        max_new_tokens=25,
        eos_token_id=eos,
        assistant_model=model,
        num_assistant_tokens=7,
        return_dict_in_generate=True,
        **SURE,
    )
    assert ours.drafted.tolist() == [first]
    assert ours.sequences.shape[1] == PROMPTS.shape[1] + first + 1


def test_a_long_prompt_is_read_in_chunks_without_the_padding_before_it(model: Any) -> None:
    for columns in (130, 250):
        ids = np.random.default_rng(columns).integers(3, 97, (2, columns))
        mask = (np.arange(columns)[None] >= [[0], [70]]).astype(int)
        call = {"attention_mask": mask, "max_new_tokens": 25, "eos_token_id": None, "return_dict_in_generate": True}
        plain = jaxgen.generate(model, ids, **call)
        ours = jaxgen.generate(model, ids, assistant_model=model, num_assistant_tokens=3, **SURE, **call)
        np.testing.assert_array_equal(ours.sequences, plain.sequences)
        np.testing.assert_array_equal(ours.rounds, 7)


# ---- With another tokenizer ----


class Log(NamedTuple):
    """An assistant's memory, and its drafts so far: after `texts[d, n]` columns, `counts[d, n]` of `tokens[d, n]`."""

    memory: AssistantMemory
    number: jax.Array
    texts: jax.Array
    tokens: jax.Array
    counts: jax.Array


@pytree
@dataclass(frozen=True)
class Logged(Drafter[Log]):
    """An assistant whose drafts are written down."""

    assistant: Assistant

    @property
    def most_tokens(self) -> int:  # type: ignore[override]
        return self.assistant.most_tokens

    def init(self, prompt: Prompt, copies: int, slots: int) -> Log:
        memory = self.assistant.init(prompt, copies, slots)
        counts = jnp.zeros((slots, len(memory.lengths)), jnp.int32)
        tokens = jnp.zeros((*counts.shape, self.most_tokens), jnp.int32)
        return Log(memory, jnp.int32(0), counts, tokens, counts)

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: Log) -> Draft[Log]:
        draft, number = self.assistant.draft(texts, limits, choose, memory.memory), memory.number
        log = Log(
            memory=draft.memory,
            number=number + 1,
            texts=memory.texts.at[number].set(texts.lengths),
            tokens=memory.tokens.at[number].set(draft.tokens),
            counts=memory.counts.at[number].set(draft.num_tokens),
        )
        return Draft(draft.tokens, draft.num_tokens, log)

    def caches(self, memory: Log) -> tuple[RaggedCache, ...]:
        return self.assistant.caches(memory.memory)

    def with_caches(self, memory: Log, caches: tuple[RaggedCache, ...]) -> Log:
        return memory._replace(memory=self.assistant.with_caches(memory.memory, caches))


def in_pieces(model: Any, prompts: np.ndarray, share: float, seed: int) -> Translation:
    """For an assistant that lacks this share of the model's tokens and reads 2 to 4 of the others in their place."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(model.vocab_size, dtype=np.int32)
    same = np.where(rng.random(len(tokens)) < share, -1, tokens)
    pieces = rng.choice(same[same > 0], (len(tokens), MOST_PIECES))
    pieces[same >= 0, 0] = same[same >= 0]
    counts = np.where(same < 0, rng.integers(2, MOST_PIECES + 1, len(tokens)), 1)
    texts = [spelled(pieces, counts, ids[ids != 0]) for ids in prompts]
    ids, mask = padded(texts, 24)
    return Translation(same, pieces, counts, Prompt(ids, mask, max(map(len, texts)), len(texts)))


def spelled(pieces: np.ndarray, counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The model's tokens as those of the assistant."""
    return np.concatenate([pieces[token, : counts[token]] for token in tokens])


def padded(texts: list[np.ndarray], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The texts and their mask, padded on the left."""
    ids = np.array([np.pad(text, (columns - len(text), 0)) for text in texts])
    return ids, np.array([np.arange(columns) >= columns - len(text) for text in texts])


@pytest.mark.parametrize(("share", "rows"), [pytest.param(0.9, 1, marks=pytest.mark.sweep), (0.4, 3)])
def test_an_assistant_drafts_after_it_has_read_every_piece_of_the_text(
    share: float, rows: int, model: Any, tiny_caches: None
) -> None:
    """Each draft is what it says after the text in its own tokens, however many passes other rows take to read theirs.

    Several tables, so that its cache is full at different times.
    """
    prompts, most, columns = PROMPTS[:rows], 3, 384
    keywords = {**CALL, "attention_mask": MASK[:rows], "max_new_tokens": 79, "suppress_tokens": [0]}
    plain = jaxgen.generate(model, prompts, **keywords)
    for seed in range(4):
        tables = in_pieces(model, prompts, share, seed)
        drafter = Logged(Assistant(model, most, 0.0, False, most, tables))
        state: Any = collect(drive(prepared(model, prompts, assistant_model=drafter, **keywords), UNWATCHED))
        np.testing.assert_array_equal(np.asarray(state.inner.sequences)[:, : plain.shape[1]], plain)

        log = jax.device_get(state.inner.memory)
        padding = tables.prompt.length - tables.prompt.attention_mask.sum(axis=1)
        room = log.memory.own.tokens.shape[1] - padding
        drafts = [(number, row) for row in range(rows) for number in range(state.inner.rounds[row])]
        lengths = [log.texts[draft] for draft in drafts]
        texts = [plain[row, :length] for (_, row), length in zip(drafts, lengths, strict=True)]
        own = [spelled(tables.pieces, tables.counts, text[text != 0]) for text in texts]
        # One token comes from the pass itself. Texts that are too long in the assistant's tokens get no drafts.
        counts = [
            max(min(most, plain.shape[1] - length - 1, room[row] - len(text)), 0)
            for (_, row), length, text in zip(drafts, lengths, own, strict=True)
        ]
        np.testing.assert_array_equal([log.counts[draft] for draft in drafts], counts)
        ids, mask = padded(own, columns)
        lacked = [token for token in range(model.vocab_size) if tables.same[token] < 0]
        said = jaxgen.generate(
            model, ids, attention_mask=mask, max_new_tokens=most, suppress_tokens=[0, *lacked], eos_token_id=None
        )
        for draft, count, expected in zip(drafts, counts, said[:, columns:], strict=True):
            np.testing.assert_array_equal(log.tokens[draft][:count], expected[:count], err_msg=f"{seed} {draft}")


# ---- With everything else ----


def test_its_cache_continues_as_that_of_the_plain_call_does(model: Any, tiny_caches: None) -> None:
    keywords = {**CALL, "return_dict_in_generate": True}
    assisted = {"assistant_model": perturbed(model, 0.2), "num_assistant_tokens": 3, **SURE}
    plain = jaxgen.generate(model, PROMPTS, **keywords)
    ours = jaxgen.generate(model, PROMPTS, **assisted, **keywords)
    assert ours.cache.get_seq_length() == plain.cache.get_seq_length()
    more = np.concatenate([plain.sequences, [[7], [8], [9]]], axis=1)
    mask = np.pad(MASK, ((0, 0), (0, more.shape[1] - MASK.shape[1])), constant_values=1)
    call = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None}
    expected = jaxgen.generate(model, more, cache=plain.cache, **call)
    for cache in (ours.cache, plain.cache):
        np.testing.assert_array_equal(jaxgen.generate(model, more, cache=cache, **call, **assisted), expected)


@pytest.mark.parametrize(
    ("model_type", "seed", "chunk"), [("mistral", 2, 4), pytest.param("qwen2", 4, None, marks=pytest.mark.sweep)]
)
def test_an_assistant_with_windows(
    model_type: str, seed: int, chunk: int | None, tmp_path: Path, tiny_caches: None
) -> None:
    windows = jaxgen.load(family_member(model_type, seed).write(tmp_path))
    keywords = {**CALL, "prefill_chunk_size": chunk, "return_dict_in_generate": True}
    plain = jaxgen.generate(windows, PROMPTS, **keywords)
    assisted = {"num_assistant_tokens": 3, **SURE}
    ours = jaxgen.generate(windows, PROMPTS, assistant_model=windows, **assisted, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)
    np.testing.assert_array_equal(ours.rounds, 7)
    ours = jaxgen.generate(windows, PROMPTS, assistant_model=perturbed(windows, 0.2), **assisted, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain.sequences)


def test_it_streams_and_decodes_inside_jit(model: Any, tiny_caches: None) -> None:
    keywords = {**CALL, "do_sample": True, "key": 3, "num_return_sequences": 2}
    expected = jaxgen.generate(model, PROMPTS, **keywords)
    keywords |= {"assistant_model": perturbed(model, 0.2), "num_assistant_tokens": 3, **SURE}
    chunks = [*jaxgen.stream(model, PROMPTS, **keywords)]
    np.testing.assert_array_equal(np.concatenate([np.repeat(PROMPTS, 2, axis=0), *chunks], axis=1), expected)
    call = jaxgen.prepare(model, PROMPTS, **keywords)
    outputs = jax.jit(jaxgen.decode)(model, call)
    np.testing.assert_array_equal(outputs["sequences"][:6, : outputs["length"]], expected)


def test_other_numbers_compile_nothing(model: Any, garbage: Any) -> None:
    def run(assistant: Any, num_tokens: int, threshold: float, schedule: str = "constant", **keywords: Any) -> None:
        options = {"num_assistant_tokens_schedule": schedule, "assistant_confidence_threshold": threshold}
        options |= {"num_assistant_tokens": num_tokens, "assistant_model": assistant}
        jaxgen.generate(model, PROMPTS, **{**CALL, **options, **keywords})

    run(garbage, 7, 0.4)
    before = jaxgen.compile_counts()
    run(perturbed(garbage, 0.1), 4, 0.0, max_new_tokens=24)
    run(garbage, 5, 0.9, max_new_tokens=23, eos_token_id=9)
    assert jaxgen.compile_counts() == before


def test_early_exit_drafts_with_the_first_layers(two_layers: Any) -> None:
    first = two_layers.first_layers(1)
    assert first.config.num_hidden_layers == 1
    np.testing.assert_array_equal(first.layers[0].mlp.down_proj.weight, two_layers.layers[0].mlp.down_proj.weight)
    keywords = {**CALL, "return_dict_in_generate": True, "num_assistant_tokens": 3, **SURE}
    plain = jaxgen.generate(two_layers, PROMPTS, **CALL)
    ours = jaxgen.generate(two_layers, PROMPTS, assistant_early_exit=1, **keywords)
    as_assistant = jaxgen.generate(two_layers, PROMPTS, assistant_model=first, **keywords)
    np.testing.assert_array_equal(ours.sequences, plain)
    np.testing.assert_array_equal(ours.accepted, as_assistant.accepted)
    assert two_layers.config.num_hidden_layers == 2


def test_settings_come_from_the_call_and_then_from_the_assistant(model: Any) -> None:
    assistant = perturbed(model, 0.0)
    assistant.generation_config = type(model.generation_config)(num_assistant_tokens=2, **SURE)

    def drafted(**keywords: Any) -> int:
        call = {**CALL, "return_dict_in_generate": True, "assistant_model": assistant, **keywords}
        return int(jaxgen.generate(model, PROMPTS, **call).drafted[0])

    assert drafted() == 16
    assert drafted(num_assistant_tokens=3) == 18


@pytest.mark.oracle
@pytest.mark.parametrize("calls", [12, pytest.param(60, marks=pytest.mark.sweep)])
def test_greedy_tokens_equal_the_assisted_calls_of_transformers(
    calls: int, model: Any, twin: Any, garbage: Any, tmp_path: Path
) -> None:
    """Of one row, as transformers decodes it."""
    import torch
    from oracle import torch_model

    jaxgen.save(garbage, tmp_path / "garbage")
    noisy = perturbed(model, 0.3)
    jaxgen.save(noisy, tmp_path / "noisy")
    pairs = [(each, torch_model(tmp_path / name)) for each, name in ((garbage, "garbage"), (noisy, "noisy"))]
    rules: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.4, "min_new_tokens": 8},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [5]},
    ]
    for number in range(calls):
        rng = np.random.default_rng(number)
        ours, theirs = pairs[number % 2]
        ids = rng.integers(3, 97, (1, 1 + number % 7))
        keywords = {"max_new_tokens": 14, "eos_token_id": [9, 40] if number % 3 else None, **rules[number % 3]}
        keywords |= {"pad_token_id": 0, "do_sample": False}
        most = [3, 1, 4, 2][number // 6 % 4]
        theirs.generation_config.num_assistant_tokens = most
        expected = twin.generate(
            torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=int), assistant_model=theirs, **keywords
        )
        found = jaxgen.generate(
            model,
            ids,
            assistant_model=ours,
            num_assistant_tokens=most,
            attention_mask=np.ones_like(ids),
            **keywords,
        )
        np.testing.assert_array_equal(found, expected.numpy(), err_msg=str((number, keywords)))


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_random_calls_of_windowed_models_give_the_tokens_of_the_plain_call(
    model_type: str, tmp_path: Path, tiny_caches: None
) -> None:
    windows = jaxgen.load(family_member(model_type, {"mistral": 2, "qwen2": 4}[model_type]).write(tmp_path))
    noisy = perturbed(windows, 0.1)
    rng = np.random.default_rng(0)
    for number in range(60):
        ids, keywords = call(rng, ["repetition_penalty"])
        keywords |= {"do_sample": number % 2 > 0, "key": number, "top_k": 20}
        if number % 3 == 0:
            keywords["prefill_chunk_size"] = 4
        plain = jaxgen.generate(windows, ids, **keywords)
        for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": noisy, "num_assistant_tokens": 3, **SURE}):
            np.testing.assert_array_equal(
                jaxgen.generate(windows, ids, **keywords, **drafts), plain, err_msg=str(number)
            )


@pytest.mark.sweep
def test_random_calls_with_stop_strings_give_the_tokens_of_the_plain_call(bundled: Any, tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    starts = ["Once upon a time", "One day, a small fox", "Tom had a red car. Tom had", "The bird", "In the wood"]
    words = ["the", "was", " a", "little", ".", "and then", "happy", "!"]
    small = jaxgen.to_int8(bundled)
    for number in range(40):
        prompts = tokenizer(list(rng.choice(starts, 3)), padding=True, return_tensors="np")
        keywords = {**prompts, "max_new_tokens": 40, "tokenizer": tokenizer, "do_sample": number % 2 > 0, "key": number}
        keywords["stop_strings"] = list(rng.choice(words, 2, replace=False))
        plain = jaxgen.generate(bundled, **keywords)
        for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small, "num_assistant_tokens": 3, **SURE}):
            np.testing.assert_array_equal(jaxgen.generate(bundled, **keywords, **drafts), plain, err_msg=str(keywords))

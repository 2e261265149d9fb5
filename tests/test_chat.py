"""A conversation on a kept cache: what each turn reads, and that its answers are those of runs from scratch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_decoders import encoder_decoder

import jaxgen
from jaxgen import chat
from jaxgen.chat import Conversation, read_messages
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.prompt import prompts
from jaxgen.generation.running.driver import UNWATCHED, collect, drive
from jaxgen.generation.trimming import to_output

ARGUMENTS = {"max_new_tokens": 12, "repetition_penalty": 1.3}
SAID = ["hello there", "and then", "who was it"]


@pytest.fixture(scope="module")
def chat_tokenizer(chat_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_folder)


@pytest.fixture
def conversation(bundled: Any, chat_tokenizer: Any) -> Conversation:
    return Conversation(bundled, chat_tokenizer)


class Decode:
    """Runs calls to their end, or shows fewer of their columns, and remembers them."""

    def __init__(self, model: Any, shown: int | None = None):
        self.model, self.shown, self.calls = model, shown, []

    def __call__(self, call: PreparedCall) -> tuple[Any, int]:
        self.calls.append(call)
        state = collect(drive(call, UNWATCHED))
        output = to_output(call, state)
        return output, (self.shown and call.prompt_length + self.shown) or output.sequences.shape[1]


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> np.ndarray:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return np.array([ids["input_ids"]])


def test_three_turns_read_only_what_is_new_and_answer_as_from_scratch(
    bundled: Any, chat_tokenizer: Any, conversation: Conversation
) -> None:
    decode, cached = Decode(bundled), 0
    for text in SAID:
        ids = rendered(chat_tokenizer, [*conversation.messages, {"role": "user", "content": text}])
        turn = conversation.ask(text, ARGUMENTS, decode)
        assert (turn.kept, turn.read) == (cached, ids.shape[1] - cached)
        assert decode.calls[-1].inputs.num_new == turn.read
        scratch = jaxgen.generate(bundled, ids, **ARGUMENTS)
        assert turn.tokens == scratch[0, ids.shape[1] :].tolist()
        cached = scratch.shape[1] - 1
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3


def test_a_conversation_compiles_once_however_long_its_turns_are(bundled: Any, chat_tokenizer: Any) -> None:
    conversation, before = Conversation(bundled, chat_tokenizer), jaxgen.compile_counts()
    for text in [*SAID, "a fox " * 40, "go on"]:
        turn = conversation.ask(text, {**ARGUMENTS, "max_new_tokens": 13}, Decode(bundled))
        assert len(turn.tokens) == 13
    conversation.reset()
    conversation.ask("once more", {**ARGUMENTS, "max_new_tokens": 14}, Decode(bundled))
    Conversation(bundled, chat_tokenizer, "be a fox").ask("hello", ARGUMENTS, Decode(bundled))
    new = {name: count - before[name] for name, count in jaxgen.compile_counts().items()}
    assert new["prefill"] <= 1 and new["advance"] <= 1 and new["grow"] == 0


def test_a_full_cache_doubles_between_turns_and_within_an_answer(
    bundled: Any, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_SLOTS", 64)
    monkeypatch.setattr(prompts, "_RESERVED_ANSWER", 4)
    conversation, decode, sizes = Conversation(bundled, chat_tokenizer), Decode(bundled), []
    for text in [*SAID, "a fox " * 20, "go on"]:
        ids = rendered(chat_tokenizer, [*conversation.messages, {"role": "user", "content": text}])
        turn = conversation.ask(text, {**ARGUMENTS, "max_new_tokens": 40}, decode)
        assert (
            turn.tokens
            == jaxgen.generate(bundled, ids, **{**ARGUMENTS, "max_new_tokens": 40})[0, ids.shape[1] :].tolist()
        )
        sizes += [decode.calls[-1].reserved, conversation._slots]
    # What a turn starts with holds what it reads, and what it ends with is what the next one starts with.
    assert sizes == [64, 128, 128, 128, 256, 256, 256, 512, 512, 512]
    conversation.reset()
    conversation.ask("once more", ARGUMENTS, decode)
    assert decode.calls[-1].reserved == 512


def test_an_answer_that_was_stopped_stays_and_the_next_turn_goes_on_from_it(
    bundled: Any, chat_tokenizer: Any, conversation: Conversation
) -> None:
    stopped = conversation.ask(SAID[0], ARGUMENTS, Decode(bundled, shown=5))
    assert len(stopped.tokens) == 5 and conversation.messages[-1]["content"] == stopped.answer
    ids = rendered(chat_tokenizer, [*conversation.messages, {"role": "user", "content": SAID[1]}])
    turn = conversation.ask(SAID[1], ARGUMENTS, Decode(bundled))
    assert turn.kept > 5
    assert turn.tokens == jaxgen.generate(bundled, ids, **ARGUMENTS)[0, ids.shape[1] :].tolist()


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    bundled: Any, chat_tokenizer: Any, conversation: Conversation
) -> None:
    def fail(_: PreparedCall) -> Any:
        raise KeyboardInterrupt

    conversation.ask(SAID[0], ARGUMENTS, Decode(bundled))
    before = list(conversation.messages)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask(SAID[1], ARGUMENTS, fail)
    assert conversation.messages == before
    ids = rendered(chat_tokenizer, [*before, {"role": "user", "content": SAID[2]}])
    turn = conversation.ask(SAID[2], ARGUMENTS, Decode(bundled))
    assert turn.kept > 10
    assert turn.tokens == jaxgen.generate(bundled, ids, **ARGUMENTS)[0, ids.shape[1] :].tolist()


def test_another_system_message_or_a_reset_reads_from_where_the_texts_part(
    bundled: Any, chat_tokenizer: Any, conversation: Conversation
) -> None:
    conversation.ask(SAID[0], ARGUMENTS, Decode(bundled))
    conversation.system = "be a fox"
    assert conversation.messages[0] == {"role": "system", "content": "be a fox"} and len(conversation.messages) == 3
    ids = rendered(chat_tokenizer, [*conversation.messages, {"role": "user", "content": SAID[1]}])
    turn = conversation.ask(SAID[1], ARGUMENTS, Decode(bundled))
    assert turn.kept == 1  # the token that starts every text
    assert turn.tokens == jaxgen.generate(bundled, ids, **ARGUMENTS)[0, ids.shape[1] :].tolist()
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be a fox"}]
    conversation.system = None
    assert conversation.messages == []


def test_a_checkpoint_that_wants_no_cache_or_another_keeps_this_one(chat_tokenizer: Any) -> None:
    model = jaxgen.load(jaxgen.BUNDLED_MODEL)
    model.generation_config.use_cache, model.generation_config.cache_implementation = False, "static"
    conversation = Conversation(model, chat_tokenizer)
    conversation.ask(SAID[0], ARGUMENTS, Decode(model))
    assert conversation.ask(SAID[1], ARGUMENTS, Decode(model)).kept > 10


def test_a_model_without_a_template_is_refused_unless_one_is_given(bundled: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(bundled, tokenizer)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    turn = Conversation(bundled, tokenizer, template=template).ask("Once upon a time", ARGUMENTS, Decode(bundled))
    assert len(turn.tokens) == 12


def test_what_is_read_ahead_is_kept_and_changes_no_answer(bundled: Any, chat_tokenizer: Any) -> None:
    conversation, decode = Conversation(bundled, chat_tokenizer, "be a fox"), Decode(bundled)
    output, shown = decode(conversation.prepare({**ARGUMENTS, "max_new_tokens": 2}))
    assert [message["role"] for message in conversation.messages] == ["system"]
    conversation.keep(output, shown)
    before = jaxgen.compile_counts()
    ids = rendered(chat_tokenizer, [*conversation.messages, {"role": "user", "content": SAID[0]}])
    turn = conversation.ask(SAID[0], ARGUMENTS, decode)
    assert jaxgen.compile_counts() == before
    assert turn.kept > 5 and turn.tokens == jaxgen.generate(bundled, ids, **ARGUMENTS)[0, ids.shape[1] :].tolist()


def test_a_question_is_asked_again_or_taken_back_and_a_failure_takes_back_nothing(
    bundled: Any, conversation: Conversation
) -> None:
    def fail(_: PreparedCall) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="there is no question yet"):
        conversation.retry(ARGUMENTS, Decode(bundled))
    first = conversation.ask(SAID[0], ARGUMENTS, Decode(bundled))
    messages = list(conversation.messages)
    conversation.ask(SAID[1], ARGUMENTS, Decode(bundled))
    assert conversation.undo() == SAID[1] and conversation.messages == messages
    with pytest.raises(KeyboardInterrupt):
        conversation.retry(ARGUMENTS, fail)
    assert conversation.messages == messages
    assert conversation.retry(ARGUMENTS, Decode(bundled)).answer == first.answer and conversation.messages == messages


TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello", "time": 3}]


@pytest.mark.parametrize("content", [TALK, {"model": "x", "messages": TALK}, []], ids=["list", "object", "empty"])
def test_messages_are_read_as_they_are_from_a_list_or_an_object(content: Any, tmp_path: Path) -> None:
    (tmp_path / "talk").write_text(json.dumps(content))
    assert read_messages(tmp_path / "talk") == (TALK if content else [])


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "{": "is not valid JSON",
        "[" * 100_000: "is not valid JSON",
        "\udcff": "is not valid JSON",
        "3": "has no messages",
        '{"messages": {}}': "has no messages",
        '["hello"]': "message 1 of .* has no `role`, which must be one of system, user, assistant",
        '[{"role": "tool", "content": "x"}]': "message 1 of .* has no `role`",
        '[{"role": ["user"], "content": "x"}]': "message 1 of .* has no `role`",
        '[{"role": "user", "content": ["x"]}]': "message 1 of .* needs a `content` that is text",
        '[{"role": "user", "content": "\\ud800"}]': "message 1 of .* needs a `content` that is text",
        '[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]': "message 2 of .* is a system message",
    }.items(),
    ids=lambda value: value[:20],
)
def test_what_is_no_conversation_is_refused_with_the_number_of_the_message(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "talk").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=said):
        read_messages(tmp_path / "talk")


def test_a_file_of_messages_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="has more than 1 MiB"):
        read_messages(Path("/dev/zero"))


def test_a_model_with_an_encoder_is_told_that_it_has_no_conversations(chat_tokenizer: Any) -> None:
    model = jaxgen.from_config(encoder_decoder(0).config)
    with pytest.raises(ValueError, match=r"has an encoder and reads one text per call\. Use `jaxgen generate"):
        Conversation(model, chat_tokenizer)

"""A conversation that keeps its cache: each turn prefills only the tokens that are not in the cache yet."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.base import Model
from jaxgen.generation.api import prepare_call
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.outputs import GenerateOutput
from jaxgen.generation.prompt.past_key_values import PastKeyValues
from jaxgen.generation.request import Request

# Cache slots of a new conversation. They double when the cache is full, and each size has its own programs. 1024 hold
# about ten short turns. Compared with 512 they cost 3 of the 25 ms of a step (135M shape, CPU).
_SLOTS = 1024

# Arguments of `generate` that cannot be combined with a kept cache.
APART = ("guidance_scale", "penalty_alpha", "token_healing", "use_cache", "cache_implementation")

Message = dict[str, Any]  # `role`, `content`, and other keys that a chat template may read
Decode = Callable[[PreparedCall], tuple[GenerateOutput, int]]

_ROLES = ("system", "user", "assistant")
_MOST_BYTES = 1 << 26  # the limit for a file of messages


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        answer: the model's text.
        tokens: the token ids of the answer, as they were shown.
        read: number of tokens that were prefilled.
        kept: number of tokens before them that were in the cache.
    """

    answer: str
    tokens: list[int]
    read: int
    kept: int


class Conversation:
    """The messages of a chat, and the cache of their tokens.

    Each turn renders and tokenises all messages. The longest common prefix of the new ids and the cached ids is kept,
    and the rest is prefilled. So a template may rewrite earlier turns, and the answer is the same as without a cache:

        in the cache    a b c d e f
        new ids         a b c x y z w       keeps a b c, prefills x y z w

    Attributes:
        model: the model that answers.
        messages: dicts with `role` and `content`, both str.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        system: str | None = None,
        template: str | None = None,
        assistant_model: object = None,
        assistant_tokenizer: Any = None,
    ):
        """Starts a conversation.

        Args:
            model: the model that answers.
            tokenizer: the model's.
            system: the system message.
            template: a Jinja chat template; the tokenizer's own by default.
            assistant_model, assistant_tokenizer: as in `generate`.

        Raises:
            ValueError: if the model has an encoder, or if there is no template.
        """
        if model.is_encoder_decoder:
            raise ValueError(
                "a conversation needs a model that continues its own text, but this one has an encoder and reads one "
                "text per call. Use `jaxgen generate --model MODEL TEXT`, or `jaxgen.generate` from Python."
            )
        if template is None:
            check_template(tokenizer)
        self.model, self._tokenizer, self._template = model, tokenizer, template
        self._assistant_model, self._assistant_tokenizer = assistant_model, assistant_tokenizer
        self.messages: list[Message] = []
        self._ids: list[int] = []
        self._past: PastKeyValues | None = None
        self._slots = min(_SLOTS, 1 << (model.max_position_embeddings - 1).bit_length())
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forgets all messages except the system message."""
        self.messages = self.messages[: self.system is not None]

    def ask(self, text: str, arguments: Mapping[str, Any], decode: Decode) -> Turn:
        """Runs one turn. If it fails, the messages are unchanged.

        Args:
            text: the user's message.
            arguments: arguments of `generate`, except those in `APART`.
            decode: runs a call, and returns its output and the length of text to keep, prompt included.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = render(self._tokenizer, asked, self._template)
        kept = min(_common_prefix(self._ids, ids), len(ids) - 1)  # the last token is always read, for its logits
        self._ids = self._ids[:kept]
        if self._past is not None:
            self._past.crop(kept - self._past.get_seq_length())
        prepared = self._prepared(ids, arguments, self._past)
        output, shown = decode(prepared)
        self.keep(output, shown)
        tokens = output.sequences[0, len(ids) : shown].tolist()
        answer = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return Turn(answer, tokens, prepared.inputs.num_new, kept)

    def undo(self) -> str:
        """Forgets the last question and everything after it, and returns the question.

        Raises:
            ValueError: if there is no question.
        """
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is no question yet. Type a message first.")
        question = self.messages[asked[-1]]["content"]
        self.messages = self.messages[: asked[-1]]
        return question

    def retry(self, arguments: Mapping[str, Any], decode: Decode) -> Turn:
        """Asks the last question again, in place of its answer; the arguments and errors are those of `ask`."""
        before = self.messages
        try:
            return self.ask(self.undo(), arguments, decode)
        except BaseException:
            self.messages = before
            raise

    def prepare(self, arguments: Mapping[str, Any]) -> PreparedCall:
        """A call that reads the messages before the next question is known.

        It runs the programs that `ask` will run, and does not change the conversation. `keep` takes its cache.
        """
        unknown = {"role": "user", "content": "?"}
        return self._prepared(render(self._tokenizer, [*self.messages, unknown], self._template), arguments, None)

    def keep(self, output: GenerateOutput, shown: int) -> None:
        """Continues from a call's cache, up to `shown` tokens. The next turn keeps the longest common prefix."""
        past = self._past = output.cache
        assert past is not None  # `use_cache` below
        self._slots = max(self._slots, past.slots)
        past.crop(min(shown - past.get_seq_length(), 0))
        self._ids = output.sequences[0, : past.get_seq_length()].tolist()

    def _prepared(self, ids: list[int], arguments: Mapping[str, Any], past: PastKeyValues | None) -> PreparedCall:
        fields = {name: value for name, value in arguments.items() if name != "key"}
        inputs = {"cache": past, "attention_mask": np.ones((1, len(ids)), int)}
        # These override the checkpoint's generation config: one answer, and its cache is needed.
        single = {"num_beams": 1, "num_return_sequences": 1}
        cache = {"use_cache": True, "cache_implementation": None, "return_dict_in_generate": True}
        request = Request(
            inputs=np.array([ids]),
            key=arguments.get("key"),
            tokenizer=self._tokenizer,
            assistant_model=self._assistant_model,
            assistant_tokenizer=self._assistant_tokenizer,
            keywords={**fields, **inputs, **single, **cache},
            reserve=self._slots,
        )
        return prepare_call(self.model, request)


def read_messages(file: Path) -> list[Message]:
    """The messages of a JSON file: a list of them, or `{"messages": [...]}` as many tools write it.

    Other keys of a message are kept for the chat template, which may read them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a message is invalid, which is named, or if the file is not such JSON or larger than 64 MiB.
    """
    with file.open("rb") as opened:
        data = opened.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{file} has more than {_MOST_BYTES >> 20} MiB. Save a shorter conversation.")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}). Pass what `/save` wrote, or a list of messages."
        ) from error
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list):
        raise ValueError(f'{file} has no messages. It must be a JSON list of them, or {{"messages": [...]}}.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {number} of {file} has no `role`, which must be one of {', '.join(_ROLES)}.")
        text = message.get("content")
        if not isinstance(text, str) or not _is_unicode(text):
            raise ValueError(f"message {number} of {file} needs a `content` that is text.")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"message {number} of {file} is a system message, which only the first one may be.")
    return messages


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can contain but tokenizers do not accept."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_template(tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the checkpoint has no chat template, so it is not a chat model. Pass a chat model, or use "
            "`jaxgen chat --chat-template FILE`."
        )


def render(tokenizer: Any, messages: list[Message], template: str | None = None) -> list[int]:
    """The token ids of messages up to where the answer begins.

    Args:
        tokenizer: the model's.
        messages: dicts with `role` and `content`.
        template: a Jinja chat template; the tokenizer's own by default.

    Raises:
        ValueError: if the template fails or returns an empty text.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is code from elsewhere, which may raise anything
        raise ValueError(f"the chat template fails: {error}. Some templates do not accept a system message.") from error
    if not encoded["input_ids"]:
        raise ValueError("the chat template returns an empty text. Pass another `--chat-template`.")
    return list(encoded["input_ids"])


def _common_prefix(first: list[int], second: list[int]) -> int:
    """The length of the longest common prefix."""
    for length, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return length
    return min(len(first), len(second))

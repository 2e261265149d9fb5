"""A conversation on a kept cache: each turn reads only what the cache does not hold yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.base import Model
from jaxgen.generation.api import prepare_call
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.past_key_values import PastKeyValues
from jaxgen.generation.request import Request

# Slots of the cache that a conversation starts with. They are doubled when it is full, and every size has its own
# programs. 1024 hold about ten short turns. Beside 512 they cost a step of the 135M shape 3 ms of 25 (CPU).
_SLOTS = 1024

# Arguments of `generate` that do not go with a kept cache.
APART = ("guidance_scale", "penalty_alpha", "token_healing", "use_cache")


@dataclass(frozen=True)
class Turn:
    """What one turn did.

    Attributes:
        answer: the model's text.
        tokens: its ids, as they were shown.
        read: columns that the prompt's forward pass read.
        kept: columns before them that the cache held.
    """

    answer: str
    tokens: list[int]
    read: int
    kept: int


class Conversation:
    """Messages, as a chat template wants them, and the cache of what the model has seen of them.

    Every turn is rendered and tokenised as a whole. Of its ids, those that the cache holds from the start are kept, and
    the rest is read: what a template changes about earlier turns is read again, and the answer is that of a run from
    scratch.

    Attributes:
        model: that answers.
        messages: dicts with `role` and `content`.
    """

    def __init__(self, model: Model, tokenizer: Any, system: str | None = None, template: str | None = None):
        """Starts one; the template is the tokenizer's own by default.

        Raises:
            ValueError: if there is no template.
        """
        if template is None:
            check_template(tokenizer)
        self.model, self._tokenizer, self._template = model, tokenizer, template
        self.messages: list[dict[str, str]] = []
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
        """Forgets all but the system message."""
        self.messages = self.messages[: self.system is not None]

    def ask(self, text: str, arguments: dict[str, Any], decode: Callable[[PreparedCall], tuple[Any, int]]) -> Turn:
        """One turn; if it fails, the conversation is as it was.

        Args:
            text: the user's.
            arguments: of `generate`; not those of `APART`.
            decode: runs a call; gives its output, and the columns to keep of it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = render(self._tokenizer, asked, self._template)
        kept = min(_common(self._ids, ids), len(ids) - 1)
        self._ids = self._ids[:kept]
        if self._past is not None:
            self._past.crop(kept - self._past.get_seq_length())
        fields = {name: value for name, value in arguments.items() if name != "key"}
        inputs = {"cache": self._past, "attention_mask": np.ones((1, len(ids)), int)}
        # Whatever the checkpoint's own settings say: here there is one answer, and its cache is kept.
        single = {"num_beams": 1, "num_return_sequences": 1}
        cache = {"use_cache": True, "cache_implementation": None, "return_dict_in_generate": True}
        request = Request(
            inputs=np.array([ids]),
            key=arguments.get("key"),
            tokenizer=self._tokenizer,
            keywords={**fields, **inputs, **single, **cache},
            reserve=self._slots,
        )
        prepared = prepare_call(self.model, request)
        output, shown = decode(prepared)
        past = self._past = output.cache
        self._slots = max(self._slots, past.slots)
        past.crop(min(shown - past.get_seq_length(), 0))
        self._ids = output.sequences[0, : past.get_seq_length()].tolist()
        tokens = output.sequences[0, len(ids) : shown].tolist()
        answer = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return Turn(answer, tokens, prepared.inputs.num_new, kept)


def check_template(tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the checkpoint has no chat template, so it was not made for conversations. Pass a model that was, or "
            "`jaxgen chat --chat-template FILE`."
        )


def render(tokenizer: Any, messages: list[dict[str, str]], template: str | None = None) -> list[int]:
    """The ids of messages up to where the answer begins, by the tokenizer's own template by default.

    Raises:
        ValueError: if the template fails.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is a program of somebody else's
        raise ValueError(f"the chat template fails: {error}. Some take no system message.") from error
    if not encoded["input_ids"]:
        raise ValueError("the chat template makes nothing of the messages. Pass another `--chat-template`.")
    return list(encoded["input_ids"])


def _common(first: list[int], second: list[int]) -> int:
    """How many ids the two begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))

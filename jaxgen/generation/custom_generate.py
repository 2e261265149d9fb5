"""`custom_generate`: decoding by a function of the caller, with the inputs that `generate` prepares.

Same as transformers 5.24 `GenerationMixin.generate`. A function gets the prepared call; a folder or repository with
`custom_generate/generate.py` gets the arguments of `generate` unchanged.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxgen import lazy
from jaxgen.base import Cache, LogitsProcessor, Model, Prompt, Source
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.request import Request
from jaxgen.processors.logits_process import process
from jaxgen.processors.stopping_criteria import any_of

Result = TypeVar("Result")

# The arguments that every such function gets; all others in its signature are its own.
_PREPARED = frozenset(
    "model input_ids logits_processor stopping_criteria generation_config attention_mask position_ids inputs_embeds "
    "cache past_key_values use_cache logits_to_keep decoder_attention_mask".split()
)


# The keywords that select a version of a repository and where to find it.
_OF_THE_HUB = frozenset("revision proxies token local_files_only cache_dir repo_type".split())


class LogitsProcessorList(list[LogitsProcessor]):
    """The processors of a call in transformers' order: `processors(input_ids, scores)`, once per token."""

    def __init__(self, processors: Iterable[LogitsProcessor], prompt: Prompt, vocab_size: int):
        super().__init__(processors)
        self._prompt, self._vocab_size = prompt, vocab_size
        self._states = self.init()

    def init(self) -> tuple[object, ...]:
        """The states before the first token, for `step`: a pytree."""
        return tuple(processor.init(self._prompt, self._vocab_size) for processor in self)

    def step(
        self, input_ids: ArrayLike, scores: ArrayLike, cur_len: ArrayLike, states: tuple[object, ...]
    ) -> tuple[jax.Array, tuple[object, ...]]:
        """The pure form, for your own `jit` and loops: returns new scores and the next states.

        Args:
            input_ids: int32 [N, S], of which the first `cur_len` columns are valid.
            scores: float32 [N, V].
            cur_len: int32 [].
            states: from `init`, then from the previous step.
        """
        return process(self, jnp.asarray(input_ids), jnp.asarray(scores, jnp.float32), jnp.asarray(cur_len), states)

    def __call__(self, input_ids: ArrayLike, scores: ArrayLike, cur_len: ArrayLike | None = None) -> jax.Array:
        """float32 [N, V]; by default all columns of `input_ids` are valid. Some processors keep a state between calls.

        Raises:
            ValueError: inside jit, if a processor has a state.
        """
        input_ids = jnp.asarray(input_ids)
        cur_len = input_ids.shape[1] if cur_len is None else cur_len
        scores, states = self.step(input_ids, scores, cur_len, self._states)
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(states)):
            self._states = states
        elif jax.tree.leaves(states):
            raise ValueError(
                "some processors of this call keep a state, which they cannot do inside jit. Use "
                "`states = logits_processor.init()` and `logits_processor.step(input_ids, scores, cur_len, states)`."
            )
        return scores


class StoppingCriteriaList(list[Callable[..., jax.Array]]):
    """The criteria of a call: `criteria(input_ids, scores)` is bool [N], the rows that are finished."""

    def __call__(self, input_ids: ArrayLike, scores: Any, cur_len: ArrayLike | None = None) -> jax.Array:
        """By default all columns of int32 [N, S] `input_ids` are valid. A pure function.

        `scores` can be None if no criterion reads it.
        """
        input_ids = jnp.asarray(input_ids)
        return any_of(self, input_ids, scores, jnp.asarray(input_ids.shape[1] if cur_len is None else cur_len))


def own_arguments(function: str | Callable[..., object] | None, given: Mapping[str, object]) -> dict[str, object]:
    """The keywords of `generate` that are a function's own arguments, by its signature.

    Raises:
        ValueError: if it is not a function, or if a `key` was passed that it does not take.
    """
    if function is None or isinstance(function, str):
        return {}
    if not callable(function):
        raise ValueError(f"`custom_generate`={function!r} must be a function, or the name of a folder or repository.")
    parameters = inspect.signature(function).parameters.values()
    names = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if given["key"] is not None and "key" not in names:
        raise ValueError(
            "the function in `custom_generate` has no argument `key`, but one was passed. Add it, or leave out `key`."
        )
    return {name: value for name, value in given.items() if name in names - _PREPARED}


def check_custom_generate(prepared: PreparedCall, request: Request) -> None:
    """Raises ValueError for arguments that only the decode loop of jaxgen supports."""
    unheeded = {
        "streamer": request.streamer is not None,
        "output_logprobs": request.output_logprobs,
        "max_time": prepared.config.max_time is not None,
        "cache_implementation": prepared.config.cache_backend is not None,
        "guidance_scale": prepared.config.merged.guidance_scale not in (None, 1),
    }
    for name, given in unheeded.items():
        if given:
            raise ValueError(
                f"`{name}` cannot be combined with `custom_generate`, whose function chooses the tokens itself. Leave "
                "it out, or implement it in your function."
            )


def call_custom(
    function: Callable[..., Result], model: Model, prepared: PreparedCall, own_arguments: Mapping[str, object]
) -> Result:
    """Calls the function and returns its result.

    It gets the model, int32 [N, P] `input_ids`, both lists, the merged GenerationConfig, and as keywords
    `attention_mask` (bool [N, L]), `position_ids` (int32 [N, T], of the tokens that are not cached), a `cache` with
    room for the longest text, `use_cache`, and its own arguments. The N rows are the prompts, each repeated for its
    beams or samples.

    With an encoder, `input_ids` is the text of the decoder, `attention_mask` is the source's, the decoder's own is
    `decoder_attention_mask`, and the `cache` holds what the decoder needs of the source: call `model.extend` with it.
    """
    config, inputs, strategy = prepared.config, prepared.inputs, prepared.call.strategy
    copies = prepared.mode.sequences_per_prompt

    def repeated(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.repeat(array, copies, axis=0))

    rows, prompt_length = len(inputs.input_ids) * copies, inputs.input_ids.shape[1]
    max_length = int(strategy.max_length.max_length)
    source = inputs.source
    # As in transformers, the config that functions get has its lengths and padding set.
    merged = copy.copy(config.merged)
    merged.max_length = max_length
    merged.pad_token_id = config.fill_token_id
    input_ids = repeated(inputs.input_ids)
    encoder_input_ids: Any = None if source is None or source.input_ids is None else repeated(source.input_ids)
    prompt = Prompt(input_ids, repeated(inputs.text_mask), jnp.int32(prompt_length), jnp.int32(rows), encoder_input_ids)
    arguments = {
        "attention_mask": repeated(inputs.attention_mask),
        "position_ids": repeated(inputs.new_positions),
        # L of the prompt, and the new tokens.
        "cache": _cache(model, inputs, copies, inputs.attention_mask.shape[1] + max_length - prompt_length),
        "use_cache": config.use_cache,
    }
    if source is not None:
        arguments["decoder_attention_mask"] = arguments["attention_mask"]
        arguments["attention_mask"] = repeated(source.attention_mask)
    if inputs.embeddings is not None:
        arguments["inputs_embeds"] = repeated(inputs.embeddings)
    # Ids below 0 pad the table of eos ids.
    eos = [strategy.eos] if (np.asarray(strategy.eos.eos_token_id) >= 0).any() else []
    return function(
        model,
        input_ids,
        logits_processor=LogitsProcessorList(strategy.processors, prompt, model.vocab_size),
        stopping_criteria=StoppingCriteriaList([strategy.max_length, *eos, *strategy.stopping_criteria]),
        generation_config=merged,
        **arguments,
        **own_arguments,
    )


def _cache(model: Model, inputs: Inputs, copies: int, slots: int) -> Cache:
    """The cache before the prompt's new tokens, with each row repeated, and with what the decoder needs of a source."""
    rows, source = len(inputs.input_ids), inputs.source
    if inputs.past is not None:
        # With one row per prompt at first: its cache is prefilled once, and then the rows are repeated on the device.
        num_cached = inputs.past.get_seq_length()
        prompts = inputs.past.to_cache(model, rows, num_cached, inputs.attention_mask[:, :num_cached])
        return prompts.repeat(copies).grow(slots)
    cache = model.make_cache(rows * copies, slots)
    if source is None:
        return cache
    read = Source(jnp.asarray(source.inputs), jnp.asarray(source.attention_mask), source.encoded)
    return _read(model, cache, read)


@jax.jit
def _read(model: Any, cache: Cache, source: Source) -> Cache:
    return model.read(cache, source)[0]


def call_repository(repository: str, trust_remote_code: bool | None = None, **given: Any) -> Any:
    """Calls `generate` of `custom_generate/generate.py` in a folder or a repository on the Hub, and returns its result.

    It gets the arguments of `generate` unchanged. Same as transformers 5.24, but without `trust_remote_code=True` it
    neither looks anything up nor asks on the terminal.

    Raises:
        ValueError: without `trust_remote_code=True`.
        OSError: if the file does not exist.
        ImportError: if packages of its `requirements.txt` are not installed.
    """
    del given["custom_generate"]
    # The repository may be written for transformers, whose `generate` does not have these arguments.
    unset = {"key": None, "tokenizer": None, "assistant_tokenizer": None, "output_logprobs": False}
    given = {name: value for name, value in given.items() if name not in unset or value is not unset[name]}
    modules = lazy.dynamic_modules()
    message = (
        f"The repository `{repository}` contains custom generation code that will override the default `generate` "
        "method."
    )
    modules.resolve_trust_remote_code(bool(trust_remote_code), repository, False, True, error_message=message)
    of_hub = {name: given[name] for name in _OF_THE_HUB & given.keys()}
    if not lazy.hub().has_file(repository, "custom_generate/generate.py", **of_hub):
        raise OSError(
            f"`{repository}` does not contain a `custom_generate` subdirectory with a `generate.py` file, can't load "
            "the custom generate function."
        )
    module = modules.get_cached_module_file(repository, module_file="custom_generate/generate.py", **of_hub)
    modules.check_python_requirements(repository, requirements_file="custom_generate/requirements.txt", **of_hub)
    return modules.get_class_in_module("generate", module)(**given)

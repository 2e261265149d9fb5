"""Core types: the interfaces between models, caches, decoding strategies and the decode loop.

The model side (`models/`, `kv_cache`, `checkpoint/`) and the decoding side (`decoding/`, `processors/`) never import
each other. They are connected by the Protocols of this file, so a test can use a transition table in place of a Llama.

Dimension letters, with one meaning in all docstrings. Programs round B, N, P, T and S up to buckets:

    B  prompts of a call
    N  rows of a batch: B, or B * num_return_sequences once the prompts are repeated
    M  rows gathered from N rows
    C  branches of a row: beams, or the candidates of contrastive search
    W  candidates of a row for one step
    P  tokens of a prompt               L  tokens of a text, cached ones included
    T  columns of a forward pass        S  slots of a cache, and columns of the token buffer
    X  columns of a source, the input of an encoder
    V  vocabulary                       E  end-of-sequence ids
    D  hidden size                      H  head dimension
    Q  query heads                      K  key-value heads          G  query heads per key-value head (Q = K * G)

With guidance the model has 2N rows. Other sizes are words, as in [steps, N, V].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxgen.pytree import Bool, Float32, Int32, pytree


@contextmanager
def no_mesh() -> Iterator[None]:
    """Unsets the mesh of the caller's `jax.set_mesh`, so that new arrays are placed on the devices of the weights.

    Otherwise JAX shards arrays made here over the caller's mesh, and then refuses to combine them with arrays that are
    not on it. A `shard_map` stays in force, and so do the `Auto` axes of a `jit`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    aside: AbstractContextManager[object] = nullcontext()
    if not mesh.empty:
        try:
            aside = jax.set_mesh(None)
        except ValueError:  # inside a `jit`, where `set_mesh` is not allowed
            # Explicit axes are part of array types, so they must be unset. Auto axes are left to the compiler.
            if all(kind == AxisType.Explicit for kind in mesh.axis_types):
                aside = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with aside:
        yield


# Number of columns beyond `columns` that a step may write to the cache of another model; see `Strategy.caches`.
MORE_COLUMNS = 5


def as_last(vector: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """Reshapes [D] to the rank of `x` [..., D], for users of `jax_numpy_rank_promotion="raise"`."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def step_buffers(names: Iterable[str], steps: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Buffers of zeros, [steps, ...] each, for arrays that are recorded at every step with these shapes."""
    return {name: jnp.zeros((steps, *shapes[name].shape), shapes[name].dtype) for name in names}


def write_step(buffers: dict[str, jax.Array], values: Mapping[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """The buffers, [steps, ...] each, with the values of one step written at index `step`."""
    return {
        name: lax.dynamic_update_index_in_dim(buffer, values[name], step, axis=0) for name, buffer in buffers.items()
    }


@pytree
@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as processors and strategies see it, padded on the left and at the bottom to its bucket.

    ```
                 P = 8, length = 5
    row 0     .  .  .  a  b  c  d  e      "." is padding of the bucket,
    row 1     .  .  .  -  -  f  g  h      "-" is padding of the caller,
    row 2     .  .  .  .  .  .  .  .      rows = 2
    ```

    Attributes:
        input_ids: int32 [N, P]. The caller's prompt (its own padding included) in the last `length` columns.
        attention_mask: bool [N, P]. False on the caller's padding and on the bucket's.
        length: int32 []. The number of columns of the caller's prompts, their own padding included.
        rows: int32 []. The number of rows of the caller's prompts; the rows below them are padding of the bucket.
        encoder_input_ids: int32 [N, X]. With an encoder, the tokens of its input, for rules that are about these; -1 in
            columns of the bucket. None without an encoder, or if it reads embeddings.
    """

    input_ids: Int32
    attention_mask: Bool
    length: Int32
    rows: Int32
    encoder_input_ids: Int32 | None = None

    def repeated(self, copies: int) -> "Prompt":
        """The prompts with each row repeated: with 2 copies, rows a, b become a, a, b, b."""
        ids = self.encoder_input_ids
        of_source: Any = None if ids is None else jnp.repeat(ids, copies, axis=0)
        return Prompt(
            jnp.repeat(self.input_ids, copies, axis=0),
            jnp.repeat(self.attention_mask, copies, axis=0),
            self.length,
            self.rows * copies,
            of_source,
        )

    def left_aligned(self, slots: int, fill: jax.typing.ArrayLike) -> jax.Array:
        """int32 [N, S]: the caller's prompt in the first `length` columns, `fill` in the others."""
        return jnp.where(jnp.arange(slots)[None] < self.length, self.moved_left(self.input_ids, slots), fill)

    def moved_left(self, array: jax.Array, slots: int) -> jax.Array:
        """[N, P, ...] -> [N, S, ...]: the prompt's columns first, then the columns of padding, then zeros."""
        # . . . a b c d e    P = 8, length = 5
        # a b c d e . . .    rolled by 5 - 8
        # a b c d e . . . 0 0    padded to S = 10
        columns = array.shape[1]
        rolled = jnp.roll(array, self.length - columns, axis=1)
        return jnp.pad(rolled, ((0, 0), (0, slots - columns), *[(0, 0)] * (array.ndim - 2)))


@pytree
@dataclass(frozen=True)
class Prefill:
    """The inputs of the prompt's forward pass, for calls where these are not just the prompt's tokens.

    With guidance there are 2N rows instead of N: the prompts, and below them their negative prompts.

    Attributes:
        inputs: int32 [N, T] tokens, or float [N, T, D] embeddings.
        attention_mask: bool [N, T]. False on padding.
        position_ids: int32 [N, T].
        past: the cache of earlier columns, with slots for these T columns too; None if there are no earlier columns.
        padding: int32 []. Columns of bucket padding at the start of the forward pass, or of its last chunk with a
            `chunk`. May be None without `past` and `chunk`.
        full_chunks: int32 []. With a `chunk`, the number of chunks before the last one. Only the last one is padded.
        guidance_scale: float32 []. None if there are no negative prompts.
        chunk: columns per forward pass, static; None to read all T at once.
    """

    inputs: jax.Array
    attention_mask: Bool
    position_ids: Int32
    past: "Cache | None" = None
    padding: Int32 | None = None
    full_chunks: Int32 | None = None
    guidance_scale: Float32 | None = None
    chunk: int | None = field(default=None, metadata={"static": True})


@pytree
@dataclass(frozen=True)
class Source:
    """The input of the encoder of an encoder-decoder model, in its bucket: padded on the right and below.

    Attributes:
        inputs: int32 [B, X] tokens, or float [B, X, D]: embeddings, or with `encoded` the output of the encoder.
        attention_mask: bool [B, X]. False on padding of the caller and of the bucket.
        encoded: static. Whether the encoder has read it already.
    """

    inputs: jax.Array
    attention_mask: Bool
    encoded: bool = field(default=False, metadata={"static": True})


@pytree
@dataclass(frozen=True)
class Call:
    """The arguments of a decode besides the weights, as one pytree. `prepare` makes one.

    Attributes:
        prompt: the token ids.
        strategy: how tokens are chosen; it also holds the maximum length.
        slots: S, static: P plus room for new tokens. The strategy's maximum length may be less.
        prefill: the inputs of the prompt's forward pass; None if they are the prompt's tokens.
        source: of an encoder-decoder model, the input of its encoder; None for other models, and if the cache that the
            call continues holds what the decoder needs of it.
        cache_backend: static. How a new cache is quantised; None if it is not, and for a cache that the call continues.
    """

    prompt: Prompt
    strategy: "Strategy"
    slots: int = field(metadata={"static": True})
    prefill: Prefill | None = None
    source: Source | None = None
    cache_backend: str | None = field(default=None, metadata={"static": True})

    @property
    def guidance_scale(self) -> jax.Array | None:
        return None if self.prefill is None else self.prefill.guidance_scale

    @property
    def model_rows(self) -> int:
        """The rows of the prompt's forward pass: N, or 2N with guidance."""
        return len(self.prompt.input_ids if self.prefill is None else self.prefill.attention_mask)

    @property
    def prompt_slots(self) -> int:
        """The number of cache slots in use once the prompt is read: P or T, or all slots of `past`."""
        if self.prefill is None:
            return self.prompt.input_ids.shape[1]
        past = self.prefill.past
        return self.prefill.attention_mask.shape[1] if past is None else past.slots


class Cache(Protocol):
    """What a model keeps of the columns so far, such as their keys and values: a pytree, never mutated."""

    @property
    def branches(self) -> int:
        """C: the number of continuations that the cache holds of each row; 1 until `branch` is called."""
        ...

    @property
    def slots(self) -> int:
        """S: the number of columns that the cache has room for."""
        ...

    @property
    def valid(self) -> jax.Array:
        """bool [N, S], or [N, C, S] with branches: the slots that the next column attends to."""
        ...

    @property
    def num_layers(self) -> int:
        """The number of layers with keys and values; 0 for a cache of another kind."""
        ...

    @property
    def memory(self) -> object:
        """What the cache keeps of a source; None without an encoder."""
        ...

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a layer, each [N, K, S, H]."""
        ...

    def with_layers(self, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> Self:
        """The same cache with other keys and values: one pair per layer, each [N, K, S, H]."""
        ...

    @property
    def backend(self) -> str | None:
        """How keys and values are quantised; None if they are in the model's dtype."""
        ...

    def quantized(self, backend: str) -> Self:
        """This empty cache, to be written with quantised keys and values: "int8" or "fp8"."""
        ...

    def grow(self, slots: int) -> Self:
        """The same cache with room for `slots` columns."""
        ...

    def reserve(self, slots: int) -> Self:
        """This cache, about to read a whole prompt in one forward pass and then to `grow` to so many slots.

        It may already make room while it is written, layer by layer, so that no prompt is there twice.
        """
        ...

    def grow_by_parts(self, slots: int, grow: Callable[[Self, int], Self]) -> Self:
        """As `grow`, called on the host, without memory for two caches at once: it deletes this cache's arrays.

        Args:
            slots: S of the new cache.
            grow: a compiled `grow`, to be called on one part of the cache at a time.
        """
        ...

    def skip(self, columns: jax.Array) -> Self:
        """Prepares the cache for a forward pass that begins with int32 [] `columns` columns of bucket padding.

        The loop calls this before `Model.extend`, so that padding does not count in distances between columns of the
        text.
        """
        ...

    def repeat(self, copies: int) -> Self:
        """The cache with each row repeated: with 2 copies, rows a, b become a, a, b, b."""
        ...

    def select(self, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> "Cache":
        """Gathers int32 [M, S] slots of int32 [M] rows; bool [M, S] says which of them may be attended.

        The first int32 [] `length` of the new slots hold columns; later ones are free.
        """
        ...

    def branch(self, branches: int) -> "BranchedCache":
        """This cache with C continuations of each row."""
        ...

    def ragged(self) -> "RaggedCache":
        """This cache with rows that advance at different speeds."""
        ...


class BranchedCache(Cache, Protocol):
    """A cache of C branches per row, whose forward passes take C columns, one for each branch."""

    def reorder(self, parents: jax.Array) -> Self:
        """The cache whose branch c continues branch `parents[n, c]` of row n; int32 [N, C]."""
        ...

    def keep(self, chosen: jax.Array) -> Self:
        """The cache whose branches all continue branch `chosen[n]` of row n; int32 [N].

        Of the last C columns only that branch's is kept.
        """
        ...


class RaggedCache(Cache, Protocol):
    """A cache whose rows may drop their last columns, a different number in each row.

    In a forward pass over T columns, each row reads only its first columns, which `attention_mask` marks.
    """

    @property
    def length(self) -> jax.Array:
        """int32 []. The number of slots in use, holes included."""
        ...

    def drop_last(self, count: jax.Array) -> Self:
        """The cache without the last `count[n]` columns of row n; int32 [N]."""
        ...

    def has_room(self, columns: int) -> jax.Array:
        """bool []. Whether T more columns fit."""
        ...

    def squeezed(self) -> Self:
        """The same cache without the holes of dropped columns."""
        ...


def tensor_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """The number of devices that heads and MLP units are sharded over."""
    return 1 if mesh is None else mesh.shape.get("tensor", 1)


def row_shards(mesh: Mesh | None) -> int:
    """The number of devices that rows are sharded over."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def rows_axis(mesh: Mesh, rows: int) -> str | None:
    """The mesh axis that the rows of an array are sharded over, or None if it does not divide them."""
    return "data" if row_shards(mesh) > 1 and rows % row_shards(mesh) == 0 else None


AnyCache = TypeVar("AnyCache", bound=Cache)

# Arrays of a forward pass besides its logits, by name: one [N, T, D] or [N, Q, T, S] per layer; see `Model.extend`.
# `cross_attentions` are [N, Q, T, X], and those of an encoder, `ENCODER_INTERMEDIATES`, [B, X, D] or [B, Q, X, X].
Intermediates = dict[str, tuple[jax.Array, ...]]
ENCODER_INTERMEDIATES = ("encoder_hidden_states", "encoder_attentions")


class Model(Protocol[AnyCache]):
    """A causal language model: a pytree of weights that makes its own cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the model is sharded over, with the axes "data" and "tensor"; None for one device."""
        ...

    def on(self, mesh: Mesh) -> Self:
        """The same model on a part of its mesh that has all of its weights. The arrays share their memory."""
        ...

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an `EncoderDecoderModel`."""
        ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def has_position_table(self) -> bool:
        """Whether there is no embedding for positions from `max_position_embeddings` on."""
        ...

    @property
    def generation_config(self) -> Any:
        """The `transformers.GenerationConfig` of the checkpoint; read on the host only."""
        ...

    @property
    def cache_bytes_per_token(self) -> int: ...

    def intermediates_bytes(self, name: str, columns: int, slots: int) -> int:
        """Bytes per row of the intermediates `name` of `extend`, for T columns that attend to S slots."""
        ...

    @property
    def slots_per_block(self) -> int | None:
        """If attention reads the slots in use only, block by block, the size of a block; None if it reads all slots."""
        ...

    def first_layers(self, count: int) -> "Model[AnyCache]":
        """A draft model: the first `count` layers of this model, with the same embeddings, final norm and head.

        Raises:
            ValueError: unless `count` is from 1 to the number of layers minus 1.
        """
        ...

    def make_cache(self, rows: int, slots: int) -> AnyCache: ...

    def extend(
        self,
        cache: AnyCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
        logits_to_keep: int = 1,
    ) -> tuple[jax.Array, AnyCache, Intermediates]:
        """One forward pass over the next T columns.

        Args:
            input_ids: int32 [N, T], or float [N, T, D] embeddings. With branches T is C, one column for each branch.
            attention_mask: bool [N, T]. False for columns that later columns may not attend to.
            position_ids: int32 [N, T], or None to continue counting.
            intermediates: names of the intermediates to return: "hidden_states", "attentions", and with an encoder
                "cross_attentions".
            logits_to_keep: for how many of the last columns to return logits; 1 with branches.

        Returns:
            float32 [N * logits_to_keep, V] logits of the last columns, row after row, or [N * C, V] of
            the last column of each branch; the cache, T columns longer; and the intermediates asked for.
            `hidden_states` are [N, T, D] each, one more than there are layers, `attentions` [N, Q, T, S] each, one per
            layer.
        """
        ...


def empty_cache(model: Model[AnyCache], rows: int, slots: int, backend: str | None) -> AnyCache:
    """A cache of the model, quantised if there is a backend."""
    cache = model.make_cache(rows, slots)
    return cache if backend is None else cache.quantized(backend)


class EncoderDecoderModel(Model[AnyCache], Protocol):
    """A language model that continues a text given a source, which its encoder reads once."""

    def read(
        self, cache: AnyCache, source: Source, intermediates: tuple[str, ...] = ()
    ) -> tuple[AnyCache, Intermediates]:
        """Runs the encoder.

        Args:
            cache: of B rows.
            source: [B, X].
            intermediates: which of `ENCODER_INTERMEDIATES` to return; with an `encoded` source none.

        Returns:
            The cache, whose rows attend the source from now on, and the intermediates asked for.
        """
        ...


ProcessorState = TypeVar("ProcessorState")


class LogitsProcessor(Generic[ProcessorState]):
    """A rule that changes the scores before a token is chosen: a pytree, whose numbers are traced.

    Most rules are only a `__call__`. A rule that would have to read all tokens at every step keeps a state instead, by
    overriding `init` and `step`. It may name the type of its state: `class Rule(LogitsProcessor[jax.Array])`.

    Attributes:
        on_host: whether it runs on the host. Such a processor is not used for drafting, which would have to wait for
            it.
    """

    on_host: ClassVar[bool] = False

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """New scores.

        Args:
            input_ids: int32 [N, S]. The prompt and the new tokens, of which the first `cur_len` columns are valid.
            scores: float32 [N, V].
            cur_len: int32 [].

        Returns:
            float32 [N, V].
        """
        raise NotImplementedError

    def init(self, prompt: Prompt, vocab_size: int) -> ProcessorState | tuple[()]:
        """The state before the first step, a pytree. The prompt's rows are already repeated, once for each text."""
        del prompt, vocab_size
        return ()

    def step(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: ProcessorState
    ) -> tuple[jax.Array, ProcessorState]:
        """New scores and the next state; the arguments are those of `__call__`."""
        return self(input_ids, scores, cur_len), state

    def step_columns(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, read: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """New scores for T consecutive tokens of each row. Calls `step` for one token of one row at a time.

        Args:
            input_ids: int32 [N, S]. The texts with the T tokens.
            scores: float32 [N, T, V]. The scores for the token at column `cur_len[n] + t`.
            cur_len: int32 [N]. The columns of each row before the T tokens.
            read: bool [N, T]. The tokens that count.
            state: the states by row: [N, 1, ...], or [N] for single numbers.

        Returns:
            float32 [N, T, V], and the states with a leading axis T + 1: before the first token, and after each of them.
        """
        del read

        def step(text: jax.Array, scores: jax.Array, length: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            changed, state = self.step(text[None], scores[None], length, state)
            if changed.shape != (1, *scores.shape):
                raise ValueError(
                    f"a processor returned scores of shape {changed.shape} for one row. In assisted decoding, rows are "
                    "at different steps, so a processor gets one row at a time and cannot hold numbers for each row. "
                    "Leave out assisted decoding."
                )
            return changed[0], state

        def token(state: Any, of_token: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, Any]]:
            number, scores = of_token
            scores, state = jax.vmap(step)(input_ids, scores, cur_len + number, state)
            return state, (scores, state)

        numbers = jnp.arange(scores.shape[1], dtype=jnp.int32)
        _, (by_token, after) = lax.scan(token, state, (numbers, scores.swapaxes(0, 1)))
        stacked = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, after)
        return by_token.swapaxes(0, 1), stacked

    def reorder(self, state: ProcessorState, rows: jax.Array) -> ProcessorState:
        """The state after row n continues row `rows[n]`, int32 [N], as in beam search.

        By default, arrays of the state must have a leading axis of N rows, or no dimensions. Otherwise override this
        method.
        """
        return jax.tree.map(lambda array: array[rows] if array.ndim else array, state)


class StoppingCriterion(Protocol):
    """A callable pytree that tells which rows are finished."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, /) -> jax.Array:
        """Whether each row is finished: bool [N], or bool [] if the answer is the same for all rows.

        In beam search the rows of `input_ids` are candidates, [B * W, S], and those of `scores` are beams, [B * C, V].

        Args:
            input_ids: int32 [N, S]. The prompt and the new tokens, of which the first `cur_len` columns are valid.
            scores: float32 [N, V]. The processed scores of the last token.
            cur_len: int32 [].
        """
        ...


class ColumnsCriterion(StoppingCriterion):
    """The base class of `host_callbacks.HostCriterion`, which is called once for all tokens of a step."""

    def of_columns(self, input_ids: jax.Array, cur_len: jax.Array, read: jax.Array) -> jax.Array:
        """bool [N, T]: whether a row is finished with each of T tokens.

        Args:
            input_ids: int32 [N, S]. The texts with the T tokens.
            cur_len: int32 [N]. The columns of each row before the T tokens.
            read: bool [N, T]. The tokens that count.
        """
        raise NotImplementedError


class EosCriterion(StoppingCriterion):
    """The base class of `stopping_criteria.EosToken`, so that this file can name it."""

    eos_token_id: Int32


class LengthCriterion(StoppingCriterion):
    """The base class of `stopping_criteria.MaxLength`."""

    max_length: Int32


class StrategyState(Protocol):
    """The loop state of a strategy: a pytree."""

    @property
    def tokens(self) -> jax.Array:
        """The next input of the model: int32 [N], [N * C] with branches, or [N, T] if the strategy has T `columns`."""
        ...

    @property
    def cur_len(self) -> jax.Array:
        """int32 []. The length of the prompt and the tokens so far, in columns."""
        ...


State = TypeVar("State", bound=StrategyState)


class Strategy(Generic[State]):
    """How tokens are chosen: a frozen dataclass and a pytree. Its numbers are traced, so a new number compiles nothing.

    The loop calls `start` once, after the prompt's forward pass, and then `step` while `unfinished`. A subclass must
    override the methods that raise here. The defaults of the others are for one token per row and forward pass.

    Attributes:
        eos: finishes a text on a token id; see `stopping_criteria.EosToken`.
        max_length: finishes all texts; see `stopping_criteria.MaxLength`.
        processors: applied in this order.
        stopping_criteria: the caller's own, besides the two above.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # so that `dataclasses.replace` takes any strategy
    eos: EosCriterion
    max_length: LengthCriterion
    processors: tuple[LogitsProcessor, ...]
    stopping_criteria: tuple[StoppingCriterion, ...]

    @property
    def copies(self) -> int:
        """How many copies of each row there are after the prompt's forward pass. Each has its own row of the cache."""
        return 1

    @property
    def branches(self) -> int:
        """C: how many branches each row has after the prompt's forward pass. They share its row of the cache."""
        return 1

    @property
    def columns(self) -> int:
        """T: the columns of each row in a forward pass. If there are several, a row may read and keep fewer."""
        return 1

    @property
    def log_probabilities(self) -> bool:
        """Whether processors get the log-softmax of the logits, as in beam search, rather than the logits."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """The intermediates that `start` and `step` read; see `Model.extend`."""
        return ()

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        """The cache slots for a prompt of `columns` columns and `new_tokens` new tokens."""
        return columns + new_tokens

    def forward_passes(self, new_tokens: int) -> int:
        """The number of forward passes after the prompt's that it takes to choose `new_tokens` tokens."""
        return new_tokens - 1  # the prompt's forward pass chooses the first token

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> State:
        """The state before the first token, with S columns in the token buffer. The prompt is not repeated yet."""
        raise NotImplementedError

    def start(
        self, prompt: Prompt, slots: int, logits: jax.Array, scores: jax.Array, intermediates: Intermediates
    ) -> State:
        """The state after the prompt's forward pass, with the first token chosen.

        Args:
            prompt: [N, P].
            slots: S, the columns of the token buffer.
            logits: float32 [N, V]; rows are not repeated yet.
            scores: float32 [N, V], the input of the processors: logits, log-probabilities or guided scores.
            intermediates: those of the prompt; see `needs`.
        """
        state = self.init(prompt, slots, logits.shape[1])
        # Rows a, b become a, a, b, b: the copies, or the branches, of a prompt are neighbours, as in the cache.
        logits, scores = (jnp.repeat(array, self.copies * self.branches, axis=0) for array in (logits, scores))
        return self.step(logits, scores, intermediates, state)

    def step(self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: State) -> State:
        """The state after a forward pass over `state.tokens`; logits and scores are float32 [N, V], or [N * C, V]."""
        raise NotImplementedError

    def parents(self, state: State) -> jax.Array | None:
        """int32 [N, C]: the branch that each branch continues after a step; see `BranchedCache.reorder`."""
        del state
        return None

    def chosen(self, state: State) -> jax.Array | None:
        """int32 [N]: the one branch that all branches continue after a step; see `BranchedCache.keep`."""
        del state
        return None

    def read(self, state: State) -> jax.Array:
        """bool [N, T]: with several `columns`, the first ones of each row, which the next forward pass reads."""
        raise NotImplementedError

    def kept(self, state: State) -> jax.Array:
        """int32 [N]: with several `columns`, how many of the columns that a step has read each row keeps."""
        raise NotImplementedError

    def caches(self, state: State) -> tuple[RaggedCache, ...]:
        """The caches of other models that the state holds. They grow together with the cache of the call's model.

        A step writes at most `columns` + `MORE_COLUMNS` columns of each.
        """
        del state
        return ()

    def bytes_of_caches(self, prompt: Prompt, new_tokens: int) -> int:
        """At least how many bytes these `caches` have in the end. The prompt is not repeated yet."""
        del prompt, new_tokens
        return 0

    def with_caches(self, state: State, caches: tuple[RaggedCache, ...]) -> State:
        """The same state with these `caches`."""
        del caches
        return state

    def unfinished(self, state: State) -> jax.Array:
        """bool []. Whether any row needs another token."""
        raise NotImplementedError

    def text(self, state: State) -> jax.Array | None:
        """int32 [N, S]. The prompts and their tokens so far; None if later steps may change them."""
        del state
        return None

    def finalize(self, state: State) -> Mapping[str, jax.Array]:
        """The outputs by their Hugging Face names, and two entries for the host.

        `length` is int32 []: the number of columns of the prompt and the tokens of all steps. `invalid` is bool [N]:
        the rows whose scores held a NaN, an infinity, or no finite number.
        """
        raise NotImplementedError

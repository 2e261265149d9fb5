"""Core types: what a model, a cache and a decoding strategy are to the decode loop.

The model column (`models/`, `kv_cache`, `checkpoint`) and the decode column (`decoding`, `sampling`, ...) never import
each other. They meet through the Protocols of this file, so a test can put a transition table where a Llama would be.

Dimension letters, used in every docstring of the package:

    B  prompts of one call              N  rows of a program: B, rounded up, times R
    P  prompt columns                   S  cache slots, and columns of the token buffer
    T  columns of one forward pass      E  end-of-sequence ids
    V  vocabulary                       D  hidden size              I  MLP size
    W  candidates of one draw           M  sequences of a rule      R  returned sequences per prompt
    C  branches of a row, such as beams
    Q  query heads                      K  key-value heads          G  query heads per key-value head (Q = K * G)
    H  head dimension
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxgen.pytree import Bool, Float32, Int32, pytree


@contextmanager
def no_mesh() -> Iterator[None]:
    """Sets the mesh of the caller's `jax.set_mesh` aside: arrays and programs then are where the model's weights are.

    JAX would spread what is made here over that mesh, and refuse to combine it with what is not. A `shard_map`, and
    axes in a `jit` that XLA spreads by itself, stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    aside: AbstractContextManager[Any] = nullcontext()
    if not mesh.empty:
        try:
            aside = jax.set_mesh(None)
        except ValueError:  # inside a `jit`
            if all(kind == AxisType.Explicit for kind in mesh.axis_types):
                aside = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with aside:
        yield


def as_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[D] with as many dimensions as `x` [..., D], for users whose JAX refuses to combine arrays of different ranks."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def step_buffers(names: Iterable[str], steps: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Zeros for what is recorded of each step, of the shapes that one step has."""
    return {name: jnp.zeros((steps, *shapes[name].shape), shapes[name].dtype) for name in names}


def write_step(buffers: dict[str, jax.Array], values: Mapping[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """The buffers, each [steps, ...], with one step's values."""
    return {
        name: lax.dynamic_update_index_in_dim(buffer, values[name], step, axis=0) for name, buffer in buffers.items()
    }


@pytree
@dataclass(frozen=True)
class Prompt:
    """The text of a batch of prompts, as processors and strategies see it: in a bucket, padded on the left and below.

    ```
                 P = 8, length = 5
    row 0     .  .  .  a  b  c  d  e      "." is padding of the bucket,
    row 1     .  .  .  -  -  f  g  h      "-" is the caller's own,
    row 2     .  .  .  .  .  .  .  .      rows = 2
    ```

    Attributes:
        input_ids: int32 [N, P]. The caller's prompt (its own padding included) in the last `length` columns.
        attention_mask: bool [N, P]. False on the caller's padding and on the bucket's.
        length: int32 []. Tokens of each of the caller's prompts.
        rows: int32 []. Rows of the caller's prompt; the rows below them belong to the bucket.
    """

    input_ids: Int32
    attention_mask: Bool
    length: Int32
    rows: Int32

    def repeated(self, copies: int) -> "Prompt":
        """Each row `copies` times."""
        return Prompt(
            jnp.repeat(self.input_ids, copies, axis=0),
            jnp.repeat(self.attention_mask, copies, axis=0),
            self.length,
            self.rows * copies,
        )

    def left_aligned(self, slots: int, fill: jax.typing.ArrayLike) -> jax.Array:
        """int32 [N, S]: the caller's prompt in the first `length` columns, `fill` in the others."""
        return jnp.where(jnp.arange(slots)[None] < self.length, self.moved_left(self.input_ids, slots), fill)

    def moved_left(self, array: jax.Array, slots: int) -> jax.Array:
        """[N, S, ...] of [N, P, ...]: the prompt's columns from the left, what was before it and zeros after it."""
        columns = array.shape[1]
        rolled = jnp.roll(array, self.length - columns, axis=1)
        return jnp.pad(rolled, ((0, 0), (0, slots - columns), *[(0, 0)] * (array.ndim - 2)))


@pytree
@dataclass(frozen=True)
class Prefill:
    """What the forward pass over the prompt reads, for calls in which that is not just the prompt's tokens.

    It has M rows: the N of the prompt, and with guidance N negative prompts below them.

    Attributes:
        inputs: int32 [M, T] tokens, or float [M, T, D] embeddings.
        attention_mask: bool [M, T]. False on padding.
        position_ids: int32 [M, T].
        past: a cache of what comes before these T columns, with slots for them too; None if nothing does.
        padding: int32 []. How many columns at the start of the forward pass, or of its last chunk, only fill a bucket.
            May be None if there is no `past`.
        full_chunks: int32 []. With a `chunk`, how many full ones come before the last, which is padded on the left.
        guidance_scale: float32 []. Given exactly if there are negative prompts.
        chunk: columns to read at a time, static; None for all at once.
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
class Call:
    """A decode as data: all that `decode` takes besides the weights. `prepare` makes one.

    Attributes:
        prompt: the text.
        strategy: how tokens are chosen; it also holds the maximum length.
        slots: S, static: P plus the most new tokens there is room for, whatever the strategy's maximum length.
        prefill: what the model reads of the prompt, or before it; None for the prompt's tokens and nothing else.
    """

    prompt: Prompt
    strategy: "Strategy"
    slots: int = field(metadata={"static": True})
    prefill: Prefill | None = None

    @property
    def guidance_scale(self) -> jax.Array | None:
        return None if self.prefill is None else self.prefill.guidance_scale

    @property
    def model_rows(self) -> int:
        """M: the rows that the model reads of the prompt."""
        return len(self.prompt.input_ids if self.prefill is None else self.prefill.attention_mask)

    @property
    def prompt_slots(self) -> int:
        """The slots of the cache that the prompt takes: P or T, or all those of `past`."""
        if self.prefill is None:
            return self.prompt.input_ids.shape[1]
        past = self.prefill.past
        return self.prefill.attention_mask.shape[1] if past is None else past.slots


class Cache(Protocol):
    """What a model remembers of the columns seen so far, such as their keys and values: a pytree, never mutated."""

    @property
    def branches(self) -> int:
        """C: the continuations of each row that it holds; 1 until `branch` is called."""
        ...

    @property
    def slots(self) -> int:
        """S: the columns that it has room for."""
        ...

    @property
    def valid(self) -> jax.Array:
        """bool [N, S], or [N, C, S] with branches: the slots that the next column attends."""
        ...

    @property
    def num_layers(self) -> int:
        """The layers that `layer` knows; 0 for a cache that is not made of keys and values."""
        ...

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a layer, each [N, K, S, H]."""
        ...

    def with_layers(self, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> Self:
        """The same cache with other keys and values: of each layer a pair, [N, K, S, H]."""
        ...

    def grow(self, slots: int) -> Self:
        """The same cache with room for `slots` columns."""
        ...

    def grow_by_parts(self, slots: int, grow: Callable[[Self, int], Self]) -> Self:
        """The same outside of a program, without memory for two caches at once: this one is gone.

        Args:
            slots: to have.
            grow: a compiled `grow`, for parts of the cache; what it was given can then be deleted.
        """
        ...

    def skip(self, columns: jax.Array) -> Self:
        """The same cache, for a forward pass whose first int32 [] columns pad a bucket and are none of the text."""
        ...

    def take(self, rows: jax.Array) -> Self:
        """The cache of int32 [M] rows of this one, in their order."""
        ...

    def select(self, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> "Cache":
        """A cache of int32 [M, S] slots of int32 [M] rows of this one, bool [M, S] of which may be attended.

        The first int32 [] `length` of them hold columns; the others are room for more.
        """
        ...

    def branch(self, branches: int) -> "BranchedCache":
        """A cache of C continuations of each row."""
        ...


class BranchedCache(Cache, Protocol):
    """A cache of C branches per row, whose forward passes take C columns, one for each branch."""

    def reorder(self, parents: jax.Array) -> Self:
        """The cache whose branch c continues branch `parents[n, c]` of row n; int32 [N, C]."""
        ...

    def keep(self, chosen: jax.Array) -> Self:
        """The cache whose branches all continue branch `chosen[n]`; only that one's last column is kept. int32 [N]."""
        ...


def tensor_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many devices heads and MLP units are spread."""
    return 1 if mesh is None else mesh.shape.get("tensor", 1)


def row_shards(mesh: Mesh | None) -> int:
    """Over how many devices rows are spread."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def rows_axis(mesh: Mesh, rows: int) -> str | None:
    """The mesh axis of the rows of an array, or None if it cannot share them out evenly."""
    return "data" if row_shards(mesh) > 1 and rows % row_shards(mesh) == 0 else None


AnyCache = TypeVar("AnyCache", bound=Cache)


Internals = dict[str, tuple[jax.Array, ...]]


class Model(Protocol[AnyCache]):
    """A causal language model: a pytree of weights that makes its own cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def mesh(self) -> Mesh | None:
        """The devices that it is spread over, by the axes "data" and "tensor"; None for one device."""
        ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def generation_config(self) -> Any:
        """The `transformers.GenerationConfig` of the checkpoint; read on the host only."""
        ...

    @property
    def cache_bytes_per_token(self) -> int: ...

    def internals_bytes(self, name: str, columns: int, slots: int) -> int:
        """Bytes that `extend` returns per row as one of its internals, for T columns that attend S slots."""
        ...

    def make_cache(self, rows: int, slots: int) -> AnyCache: ...

    def extend(
        self,
        cache: AnyCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        collect: tuple[str, ...] = (),
    ) -> tuple[jax.Array, AnyCache, Internals]:
        """One forward pass over the next T columns.

        Args:
            input_ids: int32 [N, T], or float [N, T, D] to go in place of embedded tokens.
            attention_mask: bool [N, T]. False where no later column may look.
            position_ids: int32 [N, T], or None to go on counting.
            collect: which internals to return: "hidden_states", "attentions".

        Returns:
            float32 [N, V] logits of the last column, or [N * C, V] of the C columns that continue the branches of a
            cache; the cache, T columns longer; and the internals asked for:
            `hidden_states`, one [N, T, D] more than there are layers, `attentions`, one [N, Q, T, S] per layer.
        """
        ...


class LogitsProcessor:
    """A rule that changes the scores before a token is chosen: a pytree, whose numbers are traced.

    Most rules are a `__call__`. One that would have to read the whole history at every step keeps a state instead, by
    overriding `init` and `step`.
    """

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

    def init(self, prompt: Prompt, vocab_size: int) -> Any:
        """The state before the first step, a pytree; the prompt has its N rows already."""
        del prompt, vocab_size
        return ()

    def step(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """New scores and the next state."""
        return self(input_ids, scores, cur_len), state

    def reorder(self, state: Any, rows: jax.Array) -> Any:
        """The state after row n took over from row `rows[n]`; for arrays with N rows, or without dimensions."""
        return jax.tree.map(lambda array: array[rows] if array.ndim else array, state)


class StrategyState(Protocol):
    """What a strategy carries from step to step: a pytree."""

    @property
    def tokens(self) -> jax.Array:
        """int32 [N], or [N * C] with branches. The next input of the model."""
        ...

    @property
    def cur_len(self) -> jax.Array:
        """int32 []. The columns that the prompt and the tokens so far take."""
        ...


class Strategy:
    """How tokens are chosen. A pytree: numbers are traced, so a new number compiles nothing.

    The loop calls `start` once and `step` while `unfinished`. What a strategy has to say is in the methods that raise
    here; the others fit one token per row and forward pass.

    Attributes:
        eos: finishes a text on an id; see `stopping_criteria.EosToken`.
        max_length: finishes all texts; see `stopping_criteria.MaxLength`.
        processors: in the order they act.
        stopping_criteria: more ways to finish.
    """

    eos: Any
    max_length: Any
    processors: tuple[LogitsProcessor, ...]
    stopping_criteria: tuple[Any, ...]

    @property
    def copies(self) -> int:
        """How often each row is repeated after the prompt's forward pass: rows with caches of their own."""
        return 1

    @property
    def branches(self) -> int:
        """C: how often each row branches after the prompt's forward pass: continuations that share its cache."""
        return 1

    @property
    def log_probabilities(self) -> bool:
        """Whether scores start as the log-softmax of the logits, and not as the logits."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """The internals that `start` and `step` read; see `Model.extend`."""
        return ()

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        """The slots that a prompt and so many new tokens take."""
        return columns + new_tokens

    def forward_passes(self, new_tokens: int) -> int:
        """How many follow the prompt's, for so many new tokens."""
        return new_tokens - 1

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> Any:
        """The state before the first token, for a buffer of S tokens per row, of rows that are not repeated yet."""
        raise NotImplementedError

    def start(self, prompt: Prompt, slots: int, logits: jax.Array, scores: jax.Array, internals: Internals) -> Any:
        """The state after the prompt's forward pass, with the first token chosen.

        Args:
            prompt: the text, [N, P].
            slots: S, the columns of the token buffer.
            logits: float32 [N, V]; rows are not repeated yet.
            scores: float32 [N, V], for the processors: made of the logits, see `log_probabilities`, or guided.
            internals: of the prompt, see `needs`.
        """
        state = self.init(prompt, slots, logits.shape[1])
        logits, scores = (jnp.repeat(array, self.copies * self.branches, axis=0) for array in (logits, scores))
        return self.step(logits, scores, internals, state)

    def step(self, logits: jax.Array, scores: jax.Array, internals: Internals, state: Any) -> Any:
        """The state after a forward pass over `state.tokens`; logits and scores are float32 [N, V], or [N * C, V]."""
        raise NotImplementedError

    def parents(self, state: Any) -> jax.Array | None:
        """int32 [N, C]: which branch each one continues after a step; see `BranchedCache.reorder`."""
        del state
        return None

    def chosen(self, state: Any) -> jax.Array | None:
        """int32 [N]: the one branch that all of them continue after a step; see `BranchedCache.keep`."""
        del state
        return None

    def unfinished(self, state: Any) -> jax.Array:
        """bool []. Whether any row still wants a token."""
        raise NotImplementedError

    def text(self, state: Any) -> jax.Array | None:
        """int32 [N, S]. The prompts and their tokens so far; None if later steps may change them."""
        del state
        return None

    def finalize(self, state: Any) -> Mapping[str, jax.Array]:
        """The outputs by their Hugging Face names, and two more for the host.

        `length` is int32 [], the columns that the prompt and the tokens of all steps take; `invalid` is bool [N], the
        rows that met a NaN.
        """
        raise NotImplementedError

"""Python functions inside the compiled loop: processors and criteria of transformers, and NumPy functions.

The program holds a number in place of the function, so that another function, or another instance of the same
processor, does not compile again. Every step costs a round trip to the host, and a copy of the scores.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxgen import lazy
from jaxgen.base import ColumnsCriterion, LogitsProcessor
from jaxgen.pytree import Int32, pytree

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class HostFunction(Protocol):
    """A function of int [rows, L] texts, float [rows, V] scores, and the call's index of the first of these rows."""

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray | None, first_row: int = 0) -> np.ndarray: ...


_numbers = itertools.count()
_functions: dict[int, HostFunction] = {}


@pytree
@dataclass(frozen=True)
class HostProcessor(LogitsProcessor):
    """Calls `function(input_ids [rows, cur_len], scores [rows, V])` on the host, in the order of the steps.

    Attributes:
        number: int32 []. The number of the function; see `HostFunctions.registered`.
        rows: int32 []. The number of the caller's rows; the function does not see the padding rows after them.
    """

    number: Int32
    rows: Int32
    on_host = True

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct(scores.shape, scores.dtype)
        return io_callback(_processed, result, self.number, self.rows, input_ids, scores, cur_len, ordered=True)

    def step_columns(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, read: jax.Array, state: tuple[()]
    ) -> tuple[jax.Array, tuple[()]]:
        """See `LogitsProcessor.step_columns`: one callback for all tokens, in which the function sees one at a time."""
        result = jax.ShapeDtypeStruct(scores.shape, scores.dtype)
        operands = self.number, self.rows, input_ids, scores, cur_len, read
        return io_callback(_processed_columns, result, *operands, ordered=True), state


@pytree
@dataclass(frozen=True)
class HostCriterion(ColumnsCriterion):
    """Calls `function(input_ids [rows, cur_len], None)` on the host, in the order of the steps.

    Attributes:
        number, rows: as in `HostProcessor`.
    """

    number: Int32
    rows: Int32

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool [N]."""
        result = jax.ShapeDtypeStruct(input_ids.shape[:1], jnp.bool_)
        return io_callback(_finished, result, self.number, self.rows, input_ids, cur_len, ordered=True)

    def of_columns(self, input_ids: jax.Array, cur_len: jax.Array, read: jax.Array) -> jax.Array:
        """See `base.ColumnsCriterion`: one callback for all tokens, in which the function sees one at a time."""
        result = jax.ShapeDtypeStruct(read.shape, jnp.bool_)
        operands = self.number, self.rows, input_ids, cur_len, read
        return io_callback(_finished_columns, result, *operands, ordered=True)


class HostFunctions:
    """The functions of one call, and the error that one of them raised."""

    def __init__(self) -> None:
        self._functions: dict[int, HostFunction] = {}
        self._error: BaseException | None = None
        self._forgiving = False

    def __bool__(self) -> bool:
        return bool(self._functions)

    def add(self, function: HostFunction, argument: str) -> np.int32:
        """The number that stands for the function in a program.

        Raises:
            ValueError: if JAX has no CPU backend. It names the `argument` of `generate` that holds the function.
        """
        try:
            jax.local_devices(backend="cpu")
        except RuntimeError as error:
            platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"`{argument}` runs as Python on the host, for which JAX needs its CPU backend too, but "
                f"JAX_PLATFORMS is {platforms!r}. Set JAX_PLATFORMS={platforms},cpu, or pass a JAX function of "
                "(input_ids, scores, cur_len)."
            ) from error

        def guarded(input_ids: np.ndarray, scores: np.ndarray | None, first_row: int = 0) -> np.ndarray:
            try:
                self.check()
                return function(input_ids, scores, first_row)
            except BaseException as error:
                self._error = error
                if not self._forgiving:
                    raise
                return np.zeros(len(input_ids), bool) if scores is None else scores

        number = next(_numbers)
        self._functions[number] = guarded
        return np.int32(number)

    def forgive(self) -> None:
        """Makes an error wait for the next `check`: raised in a program, it would leave other processes waiting."""
        self._forgiving = True

    def check(self) -> None:
        """Raises the error that a function has raised, if there is one."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Makes the functions callable while the call runs, and raises their errors unchanged instead of XLA's."""
        _functions.update(self._functions)
        try:
            yield
        except Exception as error:
            if self._error is not None:
                raise self._error from error
            raise
        finally:
            for number in self._functions:
                _functions.pop(number, None)


def for_processor(function: Callable[..., object]) -> HostFunction:
    """`function` with NumPy arrays as input and output; a subclass of transformers' LogitsProcessor gets tensors."""
    if _is_transformers(function):
        function = _with_tensors(function)

    def process(input_ids: np.ndarray, scores: np.ndarray | None, first_row: int = 0) -> np.ndarray:
        del first_row
        assert scores is not None
        processed = np.asarray(function(input_ids, scores))
        if processed.shape != scores.shape:
            hint = " In assisted decoding it gets one row at a time." if len(scores) == 1 else ""
            raise ValueError(f"{function} returned scores of shape {processed.shape}, but got {scores.shape}.{hint}")
        return processed

    return process


def for_prefix(prefix_allowed_tokens_fn: Callable[[int, np.ndarray], "ArrayLike"], copies: int) -> HostFunction:
    """Same as transformers 5.24 `PrefixConstrainedLogitsProcessor`, whose function gets the number of the prompt.

    Each prompt has `copies` neighbouring rows: its beams or samples.
    """

    def constrain(input_ids: np.ndarray, scores: np.ndarray | None, first_row: int = 0) -> np.ndarray:
        assert scores is not None
        mask = np.full_like(scores, -np.inf)
        for row, tokens in enumerate(input_ids):
            batch_id = (first_row + row) // copies
            allowed = np.asarray(prefix_allowed_tokens_fn(batch_id, tokens), dtype=int).reshape(-1)
            if not allowed.size:
                raise ValueError(
                    f"`prefix_allowed_tokens_fn` returned an empty list for batch ID {batch_id}. Return at least one "
                    "token: an eos id if the text may only end here."
                )
            if allowed.min() < 0 or allowed.max() >= mask.shape[1]:
                raise ValueError(
                    f"`prefix_allowed_tokens_fn` allowed {allowed[(allowed < 0) | (allowed >= mask.shape[1])][0]} for "
                    f"batch ID {batch_id}, but ids of this model are 0 to {mask.shape[1] - 1}."
                )
            mask[row, allowed] = 0
        constrained = scores + mask
        # If only -inf is left in all rows of a prompt, the constraint takes precedence over the scores.
        together = copies if len(scores) % copies == 0 else 1
        unsatisfiable = np.isneginf(constrained.max(axis=1)).reshape(-1, together).all(axis=1)
        return np.where(np.repeat(unsatisfiable, together)[:, None], mask, constrained)

    return constrain


def for_criterion(function: Callable[..., object]) -> HostFunction:
    """As `for_processor`, for a function that returns one bool, or one for each row; the result is bool [rows]."""
    if _is_transformers(function):
        function = _with_tensors(function)

    def finished(input_ids: np.ndarray, scores: np.ndarray | None, first_row: int = 0) -> np.ndarray:
        del first_row
        answers = np.asarray(function(input_ids, scores), bool)
        if answers.shape not in ((), (len(input_ids),)):
            hint = " In assisted decoding it gets one row at a time." if len(input_ids) == 1 else ""
            raise ValueError(f"{function} returned shape {answers.shape}, but there are {len(input_ids)} rows.{hint}")
        return np.broadcast_to(answers, len(input_ids))

    return finished


def _is_transformers(function: object) -> bool:
    return isinstance(function, (lazy.torch_class("LogitsProcessor"), lazy.torch_class("StoppingCriteria")))


def _with_tensors(function: Callable[..., object]) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    # These classes exist only if torch is imported.
    tensor = lazy.torch().tensor

    def call(input_ids: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
        result = function(tensor(input_ids.astype(np.int64)), None if scores is None else tensor(scores))
        return np.asarray(result)

    return call


# The arguments of a callback are padded, [N, S] and [N, V]. The functions see the caller's part of them:
#
#     input_ids      [ rows, cur_len | unwritten positions ]
#                    [ padding rows of the bucket          ]


def _processed(
    number: jax.Array, rows: jax.Array, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array
) -> np.ndarray:
    processed, count = np.array(scores), int(rows)
    prefix = np.asarray(input_ids)[:count, : int(cur_len)].copy()
    processed[:count] = _functions[int(number)](prefix, processed[:count].copy(), 0)
    return processed


def _finished(number: jax.Array, rows: jax.Array, input_ids: jax.Array, cur_len: jax.Array) -> np.ndarray:
    finished, count = np.ones(len(input_ids), bool), int(rows)  # padding rows never delay the end
    prefix = np.asarray(input_ids)[:count, : int(cur_len)].copy()
    finished[:count] = _functions[int(number)](prefix, None, 0)
    return finished


# Several tokens per row are processed one at a time, since the rows have different lengths:
#
#     input_ids      [ cur_len | tokens | unwritten positions ]     of row n, `read[n]` says which of its tokens count


def _processed_columns(
    number: jax.Array,
    rows: jax.Array,
    input_ids: jax.Array,
    scores: jax.Array,
    cur_len: jax.Array,
    read: jax.Array,
) -> np.ndarray:
    processed, function = np.array(scores), _functions[int(number)]
    for row, columns in enumerate(np.asarray(read)[: int(rows)].sum(axis=1)):
        text, length = np.asarray(input_ids)[row], int(cur_len[row])
        for column in range(columns):
            prefix = text[None, : length + column].copy()
            processed[row, column] = function(prefix, processed[row, column][None].copy(), row)[0]
            # Tokens after a forbidden one cannot be accepted, and the function may not support such texts.
            if column + 1 < columns and np.isneginf(processed[row, column, text[length + column]]):
                break
    return processed


def _finished_columns(
    number: jax.Array, rows: jax.Array, input_ids: jax.Array, cur_len: jax.Array, read: jax.Array
) -> np.ndarray:
    finished, function = np.zeros(read.shape, bool), _functions[int(number)]
    for row, column in np.argwhere(np.asarray(read)[: int(rows)]):
        prefix = np.asarray(input_ids)[row : row + 1, : int(cur_len[row]) + 1 + column].copy()
        finished[row, column] = function(prefix, None, int(row))[0]
    return finished

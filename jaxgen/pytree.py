"""Dataclasses as pytrees. Each field declares whether it is static, and the dtype of its numbers."""

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

import jax
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys

AnyClass = TypeVar("AnyClass", bound=type)


# Fields of these types hold numbers of one dtype: Python and NumPy values become NumPy arrays of it in `__init__`. Not
# JAX arrays, since each would take a dispatch of its own; NumPy leaves go to the device with the program's arguments.
if TYPE_CHECKING:

    class Number:
        """The type of such a field: any of these types can be assigned, and an array is read."""

        def __get__(self, node: object, owner: object) -> jax.Array: ...
        def __set__(self, node: object, value: "jax.typing.ArrayLike | Sequence[int]") -> None: ...

    Bool = Float32 = Int32 = UInt32 = Number
else:
    Bool = Annotated[jax.Array, np.bool_]
    Float32 = Annotated[jax.Array, np.float32]
    Int32 = Annotated[jax.Array, np.int32]
    UInt32 = Annotated[jax.Array, np.uint32]


def _dtype(declared: Any) -> type[np.generic] | None:
    """The dtype of a field's type, such as `Int32` or `Int32 | None`; None for other types."""
    return next(
        (each.__metadata__[0] for each in (declared, *get_args(declared)) if get_origin(each) is Annotated), None
    )


def pytree(cls: AnyClass) -> AnyClass:
    """Registers a dataclass as a pytree; fields with the metadata `static=True` are part of its structure.

    With `jax.tree_util.register_dataclass`, two classes with the same fields have equal tree structures (jax 0.10 to
    0.12), and `jit` sometimes runs the program of the other class, such as that of `TopP` for `MinP`. Here they differ.
    """
    static = tuple(each.name for each in fields(cls) if each.metadata.get("static"))
    dynamic = tuple(each.name for each in fields(cls) if not each.metadata.get("static"))
    dtypes = {each.name: dtype for each in fields(cls) if (dtype := _dtype(each.type))}
    keys = tuple(map(GetAttrKey, dynamic))

    def flatten(node: object) -> tuple[tuple[object, ...], tuple[Hashable, ...]]:
        return tuple(getattr(node, name) for name in dynamic), tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node: object) -> tuple[tuple[tuple[Hashable, object], ...], tuple[Hashable, ...]]:
        children, aux = flatten(node)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Hashable, ...], children: Iterable[object]) -> object:
        # Without `__init__`: JAX also puts tracers, specs and other objects in place of numbers.
        node = object.__new__(cls)
        vars(node).update(zip(dynamic, children, strict=True), **dict(zip(static, aux, strict=True)))
        return node

    if dtypes:
        made = cls.__init__

        @functools.wraps(made)
        def init(node: object, *args: object, **kwargs: object) -> None:
            made(node, *args, **kwargs)
            for name, dtype in dtypes.items():
                # Arrays of JAX, tracers, None and placeholders stay as they are.
                if isinstance(value := getattr(node, name), (bool, int, float, list, tuple, np.ndarray, np.generic)):
                    vars(node)[name] = np.asarray(value, dtype)

        cls.__init__ = init
    register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls

"""Dataclasses as pytrees, whose fields say what is static and which dtype a number has."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

import jax
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys

AnyClass = TypeVar("AnyClass", bound=type)


# Fields of these types hold numbers of one dtype: what Python or NumPy gives becomes a NumPy array of it when the node
# is made. The dispatch of a program moves such a leaf to the device; `jnp` would take a dispatch of its own.
if TYPE_CHECKING:

    class Number:
        """What is given may be of any of these types, and what is read has the methods of an array."""

        def __get__(self, node: Any, owner: Any) -> jax.Array: ...
        def __set__(self, node: Any, value: "jax.typing.ArrayLike | Sequence[int]") -> None: ...

    Bool = Float32 = Int32 = UInt32 = Number
else:
    Bool = Annotated[jax.Array, np.bool_]
    Float32 = Annotated[jax.Array, np.float32]
    Int32 = Annotated[jax.Array, np.int32]
    UInt32 = Annotated[jax.Array, np.uint32]


def _dtype(declared: Any) -> Any:
    """The dtype of a field's type, or None."""
    return next(
        (each.__metadata__[0] for each in (declared, *get_args(declared)) if get_origin(each) is Annotated), None
    )


def pytree(cls: AnyClass) -> AnyClass:
    """Registers a dataclass as a pytree; fields with the metadata `static=True` are part of its structure.

    Unlike `jax.tree_util.register_dataclass`, whose nodes of different classes compare equal (jax 0.10 to 0.12) when
    their fields do: `jit` then now and then runs the program of the other class, say of `TopP` for `MinP`.
    """
    static = tuple(each.name for each in fields(cls) if each.metadata.get("static"))
    dynamic = tuple(each.name for each in fields(cls) if not each.metadata.get("static"))
    dtypes = {each.name: dtype for each in fields(cls) if (dtype := _dtype(each.type))}
    keys = tuple(map(GetAttrKey, dynamic))

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in dynamic), tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, aux = flatten(node)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Any:
        node = object.__new__(cls)
        vars(node).update(zip(dynamic, children, strict=True), **dict(zip(static, aux, strict=True)))
        return node

    if dtypes:
        made = cls.__init__

        @functools.wraps(made)
        def init(node: Any, *args: Any, **kwargs: Any) -> None:
            made(node, *args, **kwargs)
            for name, dtype in dtypes.items():
                if isinstance(value := getattr(node, name), (bool, int, float, list, tuple, np.ndarray, np.generic)):
                    vars(node)[name] = np.asarray(value, dtype)

        cls.__init__ = init
    register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls

"""Whether a model, a batch and a context fit a device or a mesh, before anything is allocated or compiled.

Weights and cache are counted as the programs hold them, to the byte. Temporaries are the compiler's choice: what is
predicted here is what XLA was found to need (`bench/compilers.py` compares).
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxgen.buckets import bucket, row_bucket
from jaxgen.checkpoint.load import abstract, check_quantize, named_leaves, open_folder, weights_dtype
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.memory import memory_bytes
from jaxgen.generation.request import Request
from jaxgen.models import FAMILIES
from jaxgen.models.family import Config, Family, ForwardPass
from jaxgen.planning.shapes import SHAPES

_GIB = 1 << 30
_MOST_DEVICES = 256  # of a mesh that is suggested


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        name: of the kind.
        platform: as JAX calls it: "tpu", "gpu" or "cpu".
        memory: bytes that programs may use.
        share: of its whole memory, which part that is.
        bandwidth: of its memory, bytes per second; None if not known.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float | None
    share: float = 1.0


# What sets the part of a GPU's memory that JAX takes. The second name is the older one; together they are an error.
_MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


# What XLA leaves to programs, or CUDA reports; the bandwidth by data sheet. In order of memory.
_DEVICES = {
    device.name: device
    for device in (
        Device("v5e", "tpu", int(15.75 * _GIB), 819e9),
        Device("l4", "gpu", int(22.05 * _GIB), 300e9),
        Device("v6e", "tpu", int(31.25 * _GIB), 1640e9),
        Device("a100-40g", "gpu", int(39.39 * _GIB), 1555e9),
        Device("h100", "gpu", int(79.1 * _GIB), 3350e9),
        Device("a100-80g", "gpu", int(79.15 * _GIB), 2039e9),
        Device("v5p", "tpu", int(95.74 * _GIB), 2765e9),
        Device("h200", "gpu", int(139.8 * _GIB), 4800e9),
    )
}
DEVICE_NAMES = tuple(_DEVICES)
# How JAX's `device_kind` begins on these; of two that fit, the first.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5": "v5p",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA L4": "l4",
}


@dataclass(frozen=True)
class Plan:
    """What a call needs of each device. Sizes are bytes.

    Attributes:
        model: name or folder.
        parameters: of the model.
        dtype: of the weights that are not quantised, and of the cache.
        quantize: "int8" or None.
        batch: B, the prompts.
        prompt_tokens: of each prompt.
        new_tokens: at the most.
        num_beams: as in `generate`.
        num_return_sequences: as in `generate`.
        device: its name, or what JAX calls the one it has here.
        mesh: devices on the axes "data" and "tensor".
        rows: N that share out the weights' reads of a step: prompts, rounded up, times the sequences of each.
        slots: of the cache, for each of its rows.
        weights: of each device, as `cache` and the others.
        cache: when it has all its slots.
        prefill_temporaries: of the prompt's forward pass, while the cache is there.
        decode_temporaries: of a step.
        total: weights, cache and the larger of the temporaries.
        available: what programs may use.
        memory_share: of the device's memory, which part that is: JAX does not take all of a GPU's.
        step_ms: at least, milliseconds of the last step: what it reads over the bandwidth; None if that is not known.
        tokens_per_s: at most, of all rows together.
        suggestions: what would fit, if this does not.
    """

    model: str
    parameters: int
    dtype: str
    quantize: str | None
    batch: int
    prompt_tokens: int
    new_tokens: int
    num_beams: int
    num_return_sequences: int
    device: str
    mesh: tuple[int, int]
    rows: int
    slots: int
    weights: int
    cache: int
    prefill_temporaries: int
    decode_temporaries: int
    total: int
    available: int
    memory_share: float
    step_ms: float | None
    tokens_per_s: float | None
    suggestions: tuple["Plan", ...] = ()

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def plan(
    model: str | Path,
    batch: int = 1,
    prompt_tokens: int = 1024,
    new_tokens: int = 256,
    *,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    device: str | None = None,
    mesh: tuple[int, int] = (1, 1),
    follow_links: bool = False,
) -> Plan:
    """Whether a call fits, and what would if it does not. Nothing is read but headers, nothing allocated or compiled.

    Args:
        model: a folder as `load` takes it, or the name of a shape: one of `jaxgen.planning.shapes.SHAPES`.
        batch: prompts.
        prompt_tokens: of each.
        new_tokens: at the most, for each.
        num_beams: as in `generate`.
        num_return_sequences: as in `generate`; sampled if there are no beams.
        dtype: as in `load`.
        quantize: "int8" for weights of one byte and a float32 scale per row of them.
        device: "v5e", "h100", ...; the kind that JAX has here by default.
        mesh: how many devices the axes "data" and "tensor" have.
        follow_links: as in `load`.

    Returns:
        What each device needs. With `suggestions`, of every kind of change that is enough by itself the smallest:
        fewer prompts, int8, more devices, other ones; if none is, of two or three of these.

    Raises:
        ValueError: naming the argument, its value and the range.
        CheckpointError: see `load`.
    """
    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    sizes |= {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}`={size!r} must be a positive integer.")
    if len(mesh) != 2 or any(not isinstance(size, int) or size < 1 for size in mesh):
        raise ValueError(f"`mesh`={mesh!r} must be two positive integers: devices for rows, and for heads and units.")
    check_quantize(quantize)
    if device is not None and device not in _DEVICES:
        raise ValueError(f"`device`={device!r} is not known; it may be one of {[*_DEVICES]}.")
    target = _local_device() if device is None else _usable(_DEVICES[device])
    call = _Call.of(str(model), prompt_tokens, new_tokens, num_beams, num_return_sequences, dtype, follow_links)
    found = call.on(target, batch, quantize, mesh)
    return found if found.fits else replace(found, suggestions=tuple(_suggestions(call, found, target)))


def _local_device() -> Device:
    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # either, by what is missing
        raise ValueError(f"JAX finds no device here ({error}). Pass `device`, one of {[*_DEVICES]}.") from error
    name = next((name for kind, name in _KINDS.items() if device.device_kind.startswith(kind)), None)
    bandwidth = None if name is None else _DEVICES[name].bandwidth
    share = _memory_fraction() if device.platform == "gpu" else 1.0
    return Device(name or device.device_kind, device.platform, memory_bytes(), bandwidth, share)


def _usable(device: Device) -> Device:
    """With what JAX takes of a GPU's memory; of a TPU's it takes all that XLA leaves."""
    if device.platform != "gpu":
        return device
    share = _memory_fraction()
    return replace(device, memory=int(share * device.memory), share=share)


def fraction_variable() -> str:
    """The environment variable that sets the part of a GPU's memory that JAX takes."""
    return next((name for name in _MEMORY_FRACTIONS if os.environ.get(name)), _MEMORY_FRACTIONS[0])


def _memory_fraction() -> float:
    given = os.environ.get(fraction_variable()) or "0.75"
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ValueError(f"${fraction_variable()}={given!r} must be a number above 0, such as 0.75.")
    return share


@dataclass(frozen=True, eq=False)
class _Call:
    """What a plan needs to know of a model and a call, whatever the device and the batch.

    Attributes:
        arguments: of `Plan` that are as they were given.
        config: of the model.
        leaves: path and shape of each parameter.
        item: bytes of an unquantised weight, and of what is computed.
        cache_item: bytes of a slot of the cache, over all layers.
        prompt_rows: rows of the prompt's forward pass for each prompt.
        columns: P.
        slots: of the cache.
        copies: of each row, with a cache of its own.
        branches: of each row, that share it.
        tokens: that the cache of a row holds in the end.
    """

    arguments: Mapping[str, Any]
    config: Config
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    item: int
    cache_item: int
    prompt_rows: int
    columns: int
    slots: int
    copies: int
    branches: int
    tokens: int

    @classmethod
    def of(
        cls,
        name: str,
        prompt_tokens: int,
        new_tokens: int,
        num_beams: int,
        num_return_sequences: int,
        dtype: jax.typing.DTypeLike | None,
        follow_links: bool,
    ) -> "_Call":
        if name in SHAPES:
            model, own_dtype = abstract(SHAPES[name]), weights_dtype(SHAPES[name].get("dtype", "float32"))
        else:
            source = open_folder(name, follow_links=follow_links)
            model, own_dtype = source.abstract, source.dtype
        target = own_dtype if dtype in (None, "auto") else weights_dtype(dtype)
        model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, target), model)
        options = {"max_new_tokens": new_tokens, "num_beams": num_beams, "num_return_sequences": num_return_sequences}
        if num_beams == 1 and num_return_sequences > 1:
            options["do_sample"] = True
        facts: dict[str, Any] = {}

        def lowered(model: Any) -> None:
            request = Request(inputs=np.ones((1, prompt_tokens), np.int32), keywords=options)
            prepared = build_call(model, request, *read_request(model, request))
            strategy, (rows, columns) = prepared.call.strategy, prepared.call.prompt.input_ids.shape
            slots = prepared.cache_slots
            tokens = strategy.cache_slots(prompt_tokens, new_tokens)
            facts.update(cache_item=model.cache_bytes_per_token, prompt_rows=rows, columns=columns, slots=slots)
            facts.update(copies=strategy.copies, branches=strategy.branches, tokens=tokens)

        jax.eval_shape(lowered, model)
        leaves = tuple((path, leaf.shape) for path, leaf in named_leaves(model))
        arguments = {
            "model": name,
            "parameters": sum(math.prod(shape) for _, shape in leaves),
            "dtype": str(target),
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "num_beams": num_beams,
            "num_return_sequences": num_return_sequences,
        }
        return cls(arguments, model.config, leaves, target.itemsize, **facts)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    def on(self, device: Device, batch: int, quantize: str | None, mesh: tuple[int, int]) -> Plan:
        """The plan, without suggestions."""
        data, tensor = mesh
        weights, read = self._weights(quantize, tensor)
        prompt_rows = row_bucket(data, batch) * self.prompt_rows // data  # of each device, as the next
        rows = prompt_rows * self.copies
        cache = rows * self.slots * self.cache_item // tensor
        prefill = self._prefill_temporaries(prompt_rows, tensor, device.platform)
        decode = self._decode_temporaries(rows, tensor, device.platform)
        if device.platform == "cpu" and self.arguments["dtype"] == "float16":
            # XLA:CPU multiplies these in float32, and widens all weights before the loop that reads them.
            widened = 4 * self._elements(tensor)
            prefill, decode = prefill + widened, decode + widened
        seconds = None
        if device.bandwidth is not None:
            valid = -(-batch // data) * self.prompt_rows * self.copies * self.tokens * self.cache_item // tensor
            seconds = (read + valid) / device.bandwidth
        return Plan(
            **self.arguments,
            quantize=quantize,
            batch=batch,
            device=device.name,
            mesh=mesh,
            rows=rows * data * self.branches,
            slots=self.slots,
            weights=weights,
            cache=cache,
            prefill_temporaries=prefill,
            decode_temporaries=decode,
            total=weights + cache + max(prefill, decode),
            available=device.memory,
            memory_share=device.share,
            step_ms=None if seconds is None else 1e3 * seconds,
            tokens_per_s=None if seconds is None else batch * self.copies / seconds,
        )

    @functools.cache  # noqa: B019  # of few, which live as long as a plan is made
    def _weights(self, quantize: str | None, tensor: int) -> tuple[int, int]:
        """Bytes of the weights on each device, and of those that a step reads."""
        total = read = 0
        for path, shape, share in self._shares(tensor):
            size = math.prod(shape) // math.prod(share)
            if quantize is None or len(shape) == 1:
                size *= self.item
            else:
                size += 4 * shape[0] // share[0]
            total += size
            # Of an embedding that is no head, a step reads a vector for each row.
            if path != self.family.embedding or self.config.tie_word_embeddings:
                read += size
        return total, read

    def spreads(self, tensor: int) -> bool:
        """Whether the weights can be spread over so many devices."""
        try:
            self.family.partition(self.config, _spread(tensor))
        except ValueError:
            return False
        return True

    def _elements(self, tensor: int) -> int:
        return sum(math.prod(shape) // math.prod(share) for _, shape, share in self._shares(tensor))

    def _shares(self, tensor: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Path and shape of each parameter, and over how many devices the dimensions are spread."""
        spec = self.family.partition(self.config, _spread(tensor))
        for path, shape in self.leaves:
            axes = (*spec(path), *(None for _ in shape))
            yield path, shape, tuple(1 if axis is None else tensor for axis, _ in zip(axes, shape, strict=False))

    def _prefill_temporaries(self, rows: int, tensor: int, platform: str) -> int:
        """What the layers have alive, the prompt's keys and values, and the logits."""
        # All layers' keys and values, before the cache grows to all its slots, on a GPU in two copies; a CPU grows each
        # layer by itself.
        copies = {"cpu": 0, "tpu": 1, "gpu": 2}[platform]
        short_cache = copies * rows * self.columns * self.cache_item // tensor
        logits = 4 * rows * self.config.vocab_size
        return self._activations(rows, self.columns, self.columns, tensor, platform) + short_cache + logits

    def _decode_temporaries(self, rows: int, tensor: int, platform: str) -> int:
        """What the layers have alive, and the logits, which beams have in three forms at a time."""
        rows *= self.branches
        logits = 4 * rows * self.config.vocab_size
        return logits * (1 if self.branches == 1 else 3) + self._activations(rows, 1, self.slots, tensor, platform)

    def _activations(self, rows: int, columns: int, slots: int, tensor: int, platform: str) -> int:
        item = max(self.item, 4) if platform == "cpu" else self.item  # XLA:CPU computes in float32
        return self.family.activation_bytes(self.config, ForwardPass(rows, columns, slots, item, tensor, platform))


def _suggestions(call: _Call, given: Plan, device: Device) -> Iterator[Plan]:
    """Of every kind of change, or of two or three together if none is enough, the smallest that fits."""
    kinds: dict[str, list[Any]] = {
        "batch": _fewer(given.batch, given.mesh[0]),
        "quantize": ["int8"] if given.quantize is None else [],
        "mesh": _larger_meshes(call, given.mesh),
        "device": [usable for usable in map(_usable, _DEVICES.values()) if usable.memory > device.memory],
    }
    options: dict[str, Any] = {
        "device": device,
        "batch": given.batch,
        "quantize": given.quantize,
        "mesh": given.mesh,
    }
    found = False
    for count in range(1, 4):
        for names in itertools.combinations(kinds, count):
            for values in itertools.product(*(kinds[name] for name in names)):
                plan = call.on(**{**options, **dict(zip(names, values, strict=True))})
                if plan.fits:
                    found = True
                    yield plan
                    break
        if found:
            return


def _fewer(batch: int, data: int) -> list[int]:
    """Smaller batches, each a whole bucket, the largest first."""
    sizes, size = [], bucket(-(-batch // data))
    while size > 1:
        size = size * 2 // 3 if size % 3 == 0 else size * 3 // 4
        sizes.append(size * data)
    return sizes


def _larger_meshes(call: _Call, mesh: tuple[int, int]) -> list[tuple[int, int]]:
    """With more devices on either axis by doubling, and where weights come out even; the smallest first."""
    tensors = [size for size in range(mesh[1], _MOST_DEVICES + 1) if call.spreads(size)]
    datas = [mesh[0] << doubling for doubling in range(9)]
    meshes = [(data, tensor) for tensor in tensors for data in datas if data * tensor <= _MOST_DEVICES]
    return sorted((each for each in meshes if each != mesh), key=lambda each: (each[0] * each[1], -each[1]))


def _spread(tensor: int) -> AbstractMesh:
    return AbstractMesh((1, tensor), ("data", "tensor"))

"""Checks whether a model, a batch and a context fit in a device's or a mesh's memory, without allocating or compiling.

Weights and cache are counted to the byte. Temporaries are up to the compiler: their sizes here are fitted to what XLA
needed (`bench/compilers.py` compares).
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxgen.buckets import bucket, row_bucket
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.load import QUANTIZATIONS, abstract, check_quantize
from jaxgen.checkpoint.source import Source, named_leaves, open_checkpoint, weights_dtype
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.modes.assisted import MOST_DRAFTED, prompt_lookup
from jaxgen.generation.request import Request
from jaxgen.generation.running.driver import cache_sizes
from jaxgen.generation.running.memory import memory_bytes
from jaxgen.models import FAMILIES, LoadedModel
from jaxgen.models.family import Config, Family, ForwardPass
from jaxgen.models.int4 import GROUP, group_count
from jaxgen.models.int8 import is_quantised, outlier_columns
from jaxgen.planning.shapes import SHAPES
from jaxgen.quantized_array import BACKENDS

_GIB = 1 << 30
_MOST_DEVICES = 256  # of a suggested mesh


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        name: name of the kind.
        platform: as JAX calls it: "tpu", "gpu" or "cpu".
        memory: bytes that programs may use.
        bandwidth: memory bandwidth in bytes per second; None if not known.
        share: the part of the device's whole memory that `memory` is.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float | None
    share: float = 1.0


# Set the share of a GPU's memory that JAX takes. The second name is the older one; JAX refuses both together.
_MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# Memory as XLA leaves it to programs, or as CUDA reports it; bandwidth from the data sheet. In order of memory.
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
# Prefixes of JAX's `device_kind`; the first match is used.
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
    """The memory and time of a call. Sizes are bytes on each device.

    Attributes:
        model: name or folder.
        parameters: number of parameters.
        dtype: the dtype of the cache, and of weights that are not quantised.
        quantize: "int8", "int4" or None.
        batch: B, the prompts.
        prompt_tokens: tokens per prompt; of the source, if the model has an encoder.
        new_tokens: maximum number of new tokens per prompt.
        num_beams: as in `generate`.
        num_return_sequences: as in `generate`.
        device: its name in `DEVICE_NAMES`, or JAX's name of the local device.
        mesh: number of devices on the axes "data" and "tensor".
        rows: N, over all devices: prompts, rounded up, times the sequences or beams of each.
        slots: S, the slots of the cache at its full size.
        weights: bytes of the weights.
        cache: bytes of the cache at its full size.
        source: bytes of what the decoder keeps of the sources; 0 without an encoder.
        prefill_temporaries: bytes of temporaries in the prompt's forward pass.
        decode_temporaries: bytes of temporaries in a decode step.
        total: weights and caches of both models, the source, and the larger of the temporaries.
        available: bytes that programs may use.
        memory_share: the part of the device's whole memory that `available` is: JAX does not take all of a GPU's.
        step_ms: lower bound of the last step's time: the bytes that it reads, divided by the bandwidth. None if that is
            not known, and with an assistant, whose drafts decide.
        tokens_per_s: upper bound for all rows together; None likewise.
        assistant_model: name or folder of the assistant, "int8" or "int4"; None without one.
        assistant_weights: bytes.
        assistant_cache: bytes, at about its full size, with what it keeps of the sources.
        cache_backend: how the model's cache is quantised; None if it is in `dtype`.
        suggestions: plans that would fit, if this one does not.
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
    source: int
    prefill_temporaries: int
    decode_temporaries: int
    total: int
    available: int
    memory_share: float
    step_ms: float | None
    tokens_per_s: float | None
    assistant_model: str | None = None
    assistant_weights: int = 0
    assistant_cache: int = 0
    cache_backend: str | None = None
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
    revision: str | None = None,
    assistant_model: str | Path | None = None,
    num_assistant_tokens: int | None = None,
    cache_backend: str | None = None,
) -> Plan:
    """Whether a call fits in memory, and if it does not, what would. Reads only configs and headers.

    A model on the hub is still downloaded, weights included.

    Args:
        model: a folder or a name on the hub, as `load` takes them, or a name in `jaxgen.planning.shapes.SHAPES`.
        batch: number of prompts.
        prompt_tokens: tokens per prompt; of the source, if the model has an encoder.
        new_tokens: maximum number of new tokens per prompt.
        num_beams: as in `generate`.
        num_return_sequences: as in `generate`; sampled if there are no beams.
        dtype: as in `load`.
        quantize: as in `load`.
        device: "v5e", "h100", ...; the local device by default.
        mesh: number of devices on the axes "data" and "tensor".
        follow_links: as in `load`.
        revision: as in `load`.
        assistant_model: like `model`, what drafts tokens for it; or "int8" or "int4", for a copy of it in that.
        num_assistant_tokens: as in `generate`; 20 by default.
        cache_backend: how the model's cache is quantised, the `backend` of `cache_config` in `generate`.

    Returns:
        The memory and time of the call. If it does not fit, `suggestions` holds, for each kind of change that is enough
        by itself (fewer prompts, int8 or int4, more devices, another device), the smallest such change; if none is
        enough, combinations of two or three.

    Raises:
        ValueError: naming the argument, its value and the range.
        CheckpointError: see `load`.
    """
    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    sizes |= {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    if assistant_model is None and num_assistant_tokens is not None:
        raise ValueError(
            f"`num_assistant_tokens`={num_assistant_tokens} has no effect without `assistant_model`. Pass both."
        )
    drafted = 20 if num_assistant_tokens is None else num_assistant_tokens
    sizes["num_assistant_tokens"] = drafted
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}`={size!r} must be a positive integer.")
    if drafted > MOST_DRAFTED:
        raise ValueError(f"`num_assistant_tokens`={drafted} must be from 1 to {MOST_DRAFTED}.")
    if len(mesh) != 2 or any(not isinstance(size, int) or size < 1 for size in mesh):
        raise ValueError(
            f"`mesh`={mesh!r} must be two positive integers: the devices for rows, and for heads and MLP units."
        )
    check_quantize(quantize)
    if cache_backend not in (None, *BACKENDS):
        raise ValueError(f"`cache_backend`={cache_backend!r} must be one of {[*BACKENDS]}, or None.")
    if device is not None and device not in _DEVICES:
        raise ValueError(f"`device`={device!r} is not known; it may be one of {[*_DEVICES]}.")
    target = _local_device() if device is None else _usable(_DEVICES[device])
    source = _source(model, revision, follow_links)
    drafted = 0 if assistant_model is None else drafted

    def sizes_of(name: str, source: Source | None) -> _Call:
        return _Call.of(
            *(name, source, prompt_tokens, new_tokens, num_beams, num_return_sequences, dtype, drafted),
            cache_backend if name == str(model) else None,
        )

    call = sizes_of(str(model), source)
    if assistant_model in QUANTIZATIONS:
        kind = str(assistant_model)
        if quantize is not None:
            raise ValueError(f"`assistant_model`={kind!r} drafts for a model in full. Leave out `quantize`.")
        call = replace(call, assistant=_Assistant(kind, call, kind))
    elif assistant_model is not None:
        name = str(assistant_model)
        drafting = sizes_of(name, _source(name, None, follow_links))
        if bool(drafting.sources) != bool(call.sources):
            with_encoder, without = (name, model) if drafting.sources else (model, name)
            raise ValueError(f"{with_encoder} has an encoder and {without} has none, so neither drafts for the other.")
        call = replace(call, assistant=_Assistant(name, drafting, None))
    setup = _Setup(target, batch, quantize, mesh)
    planned = call.on(setup)
    return planned if planned.fits else replace(planned, suggestions=tuple(_suggestions(call, setup)))


def _check_positions(model: LoadedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ValueError for a source or a text that is longer than the model's table of positions."""
    for name, tokens in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if model.has_position_table and tokens > (longest := model.max_position_embeddings):
            raise ValueError(
                f"`{name}`={tokens} is more than the {longest} positions that the model has "
                f"(`max_position_embeddings`). Pass at most {longest}: `--{name.replace('_', '-')} {longest}` on the "
                "command line."
            )


def _source(model: str | Path, revision: str | None, follow_links: bool) -> Source | None:
    """The checkpoint of a model; None for a name in `SHAPES`."""
    if str(model) not in SHAPES:
        return open_checkpoint(local_path(model, revision), follow_links=follow_links)
    if revision is not None:
        raise ValueError(
            f"`revision`={revision!r} is for a model on the hub, and {model} is only a size. Leave it out."
        )
    return None


def _local_device() -> Device:
    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX raises either, depending on what is missing
        raise ValueError(f"JAX finds no device ({error}). Pass `device`, one of {[*_DEVICES]}.") from error
    name = next((name for kind, name in _KINDS.items() if device.device_kind.startswith(kind)), None)
    bandwidth = None if name is None else _DEVICES[name].bandwidth
    share = _memory_fraction() if device.platform == "gpu" else 1.0
    return Device(name or device.device_kind, device.platform, memory_bytes(), bandwidth, share)


def _usable(device: Device) -> Device:
    """The device with the memory that JAX takes: a part of a GPU's, all of a TPU's."""
    if device.platform != "gpu":
        return device
    share = _memory_fraction()
    return replace(device, memory=int(share * device.memory), share=share)


def fraction_variable() -> str:
    """The environment variable that sets the share of a GPU's memory that JAX takes."""
    return next((name for name in _MEMORY_FRACTIONS if os.environ.get(name)), _MEMORY_FRACTIONS[0])


def _memory_fraction() -> float:
    text = os.environ.get(fraction_variable()) or "0.75"  # JAX's own default
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ValueError(f"${fraction_variable()}={text!r} must be a number above 0, such as 0.75.")
    return share


class _Setup(NamedTuple):
    """The arguments of `plan` that a suggestion may change; see `plan`."""

    device: Device
    batch: int
    quantize: str | None
    mesh: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Call:
    """The sizes of a model and a call that do not depend on the `_Setup`.

    Attributes:
        plan: makes the `Plan`, with the fields that are already known.
        config: the model's config.
        leaves: path and shape of each parameter.
        dtype: the dtype of unquantised weights and of activations.
        slot_bytes: bytes of a cache slot, over all layers; also of a column of the source.
        prompt_rows: rows of the prefill per prompt.
        columns: P.
        sources: X, the columns of the source; 0 without an encoder.
        slots: S, the slots of the cache.
        copies: copies of each row after the prefill, each with its own row of the cache.
        branches: C, the branches of each row, which share its row of the cache.
        tokens: number of tokens in the cache of a row at the end.
        step_columns: T of a decode step.
        assistant: the model that drafts the tokens; None without one.
    """

    plan: functools.partial[Plan]
    config: Config
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: np.dtype
    slot_bytes: int
    prompt_rows: int
    columns: int
    sources: int
    slots: int
    copies: int
    branches: int
    tokens: int
    step_columns: int
    assistant: "_Assistant | None"

    @classmethod
    def of(
        cls,
        name: str,
        source: Source | None,
        prompt_tokens: int,
        new_tokens: int,
        num_beams: int,
        num_return_sequences: int,
        dtype: jax.typing.DTypeLike | None,
        drafted: int,
        cache_backend: str | None,
    ) -> "_Call":
        if source is None:
            model, own_dtype = abstract(SHAPES[name]), weights_dtype(SHAPES[name].get("dtype", "float32"))
        else:
            model, own_dtype = source.abstract, source.dtype
        target = own_dtype if dtype in (None, "auto") else weights_dtype(dtype)
        model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, target), model)
        options = {"max_new_tokens": new_tokens, "num_beams": num_beams, "num_return_sequences": num_return_sequences}
        if num_beams == 1 and num_return_sequences > 1:
            options["do_sample"] = True
        if cache_backend is not None:
            options |= {"cache_implementation": "quantized", "cache_config": {"backend": cache_backend}}
        if model.is_encoder_decoder:
            _check_positions(model, prompt_tokens, new_tokens)
            # Any ids do; a checkpoint need not say where texts begin.
            options |= {"decoder_start_token_id": 0, "max_length": None}
        sizes: dict[str, int] = {}

        def measure(model: LoadedModel) -> None:
            # Any drafter of as many tokens will do, and one that is not a model needs no tokenizers.
            drafter = prompt_lookup(drafted) if drafted else None
            inputs = np.ones((1, prompt_tokens), np.int32)
            request = Request(inputs=inputs, assistant_model=drafter, keywords=options)
            prepared = build_call(model, request, *read_request(model, request))
            strategy, (rows, columns) = prepared.call.strategy, prepared.call.prompt.input_ids.shape
            source = prepared.inputs.source
            tokens = strategy.cache_slots(prepared.prompt_length, new_tokens)
            sizes.update(slot_bytes=prepared.cache_bytes_per_token, prompt_rows=rows, columns=columns)
            sizes.update(slots=prepared.cache_slots, tokens=tokens, step_columns=strategy.columns)
            if strategy.columns > 1:  # a cache with rows of their own lengths grows while less than an eighth is free
                enough = (size.slots for size in cache_sizes(prepared, 0) if size.slots * 7 // 8 >= tokens)
                sizes.update(slots=next(enough))
            sizes.update(copies=strategy.copies, branches=strategy.branches)
            sizes.update(sources=0 if source is None else source.bucket)

        jax.eval_shape(measure, model)  # traced, so that building the call allocates nothing
        leaves = tuple((path, leaf.shape) for path, leaf in named_leaves(model))
        plan = functools.partial(
            Plan,
            model=name,
            parameters=sum(math.prod(shape) for _, shape in leaves),
            dtype=str(target),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            cache_backend=cache_backend,
        )
        return cls(plan, model.config, leaves, target, **sizes, assistant=None)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    def on(self, setup: _Setup) -> Plan:
        """The plan, without suggestions."""
        device, batch, quantize, (data, tensor) = setup
        weights, read = self._weights(quantize, tensor)
        prompt_rows = row_bucket(data, batch) * self.prompt_rows // data  # on each device, like `rows`
        rows = prompt_rows * self.copies
        cache = rows * self.slots * self.slot_bytes // self._cache_shards(tensor)
        source = (
            prompt_rows * self.sources * self.slot_bytes // self._cache_shards(tensor)
        )  # which the rows of a prompt share
        prefill = self._prefill_temporaries(prompt_rows, tensor, device.platform)
        decode = self._decode_temporaries(rows, tensor, device.platform)
        if device.platform == "cpu" and self.dtype == np.float16:
            # XLA:CPU multiplies float16 in float32, and widens all weights before the loop that reads them.
            widened = 4 * self._elements(tensor)
            prefill, decode = prefill + widened, decode + widened
        seconds, drafts = None, {"assistant_weights": 0, "assistant_cache": 0}
        if self.assistant is not None:
            call, quantized = self.assistant.call, self.assistant.quantize
            drafts["assistant_weights"] = call._weights(quantized, tensor)[0]
            drafts["assistant_cache"] = (
                (rows * call.slots + prompt_rows * call.sources) * call.slot_bytes // call._cache_shards(tensor)
            )
        elif device.bandwidth is not None:
            # The prompts on a device without bucket padding, and the slots that hold tokens by then.
            slots = self.copies * self.tokens + min(self.sources, self.plan.keywords["prompt_tokens"])
            valid = -(-batch // data) * self.prompt_rows * slots * self.slot_bytes // self._cache_shards(tensor)
            seconds = (read + valid) / device.bandwidth
        return self.plan(
            quantize=quantize,
            batch=batch,
            device=device.name,
            mesh=setup.mesh,
            rows=rows * data * self.branches,
            slots=self.slots,
            weights=weights,
            cache=cache,
            source=source,
            prefill_temporaries=prefill,
            decode_temporaries=decode,
            total=weights + cache + source + sum(drafts.values()) + max(prefill, decode),
            available=device.memory,
            memory_share=device.share,
            step_ms=None if seconds is None else 1e3 * seconds,
            tokens_per_s=None if seconds is None else batch * self.copies / seconds,
            assistant_model=None if self.assistant is None else self.assistant.name,
            **drafts,
        )

    @functools.cache  # noqa: B019  # a few entries, for as long as a plan is made
    def _weights(self, quantize: str | None, tensor: int) -> tuple[int, int]:
        """Bytes of the weights on each device, and bytes of the weights that a step reads."""
        total = read = 0
        for path, shape, share in self._shares(tensor):
            size = math.prod(shape) // math.prod(share)
            if quantize is None or not is_quantised(shape):
                size *= self.dtype.itemsize
            else:  # a float32 scale per row of the matrix, and its outlier columns with their int32 numbers
                if quantize == "int4" and path not in (self.family.embedding, self.family.head):
                    groups = group_count(shape[1])  # of half a byte per weight, and a byte
                    groups //= share[1] if groups % share[1] == 0 else 1
                    size = (GROUP // 2 + 1) * groups * shape[0] // share[0]
                outliers = outlier_columns(shape[1])
                size += (4 + outliers * self.dtype.itemsize) * shape[0] // share[0] + 4 * outliers
            total += size
            # A step reads only a few rows of an embedding, unless the embedding is also the head.
            of_prompt = path == self.family.embedding and not self.config.tie_word_embeddings
            if not (of_prompt or self.family.of_source(path)):
                read += size
        return total, read

    def spreads(self, tensor: int) -> bool:
        """Whether the weights, and those of the assistant, can be sharded over `tensor` devices."""
        if self.assistant is not None and not replace(self.assistant.call, assistant=None).spreads(tensor):
            return False
        try:
            self.family.partition(self.config, _spread(tensor))
        except ValueError:
            return False
        return True

    def _cache_shards(self, tensor: int) -> int:
        return self.family.cache_shards(self.config, tensor)

    def _elements(self, tensor: int) -> int:
        return sum(math.prod(shape) // math.prod(share) for _, shape, share in self._shares(tensor))

    def _shares(self, tensor: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Path and shape of each parameter, and the number of devices that each dimension is sharded over."""
        spec = self.family.partition(self.config, _spread(tensor))
        for path, shape in self.leaves:
            axes = (*spec(path), *(None for _ in shape))
            yield path, shape, tuple(1 if axis is None else tensor for axis, _ in zip(axes, shape, strict=False))

    def _prefill_temporaries(self, rows: int, tensor: int, platform: str) -> int:
        """Activations, a cache for the prompt alone, and the logits."""
        # Each layer's keys and values are written where they will stay, but on TPUs that share a cache they all exist
        # before it grows to its slots.
        shards = self._cache_shards(tensor)
        copies = 1 if platform == "tpu" and shards > 1 else 0
        short_cache = copies * rows * self.columns * self.slot_bytes // shards
        logits = 4 * rows * self.config.vocab_size
        decoder = self._activations(rows, self.columns, max(self.columns, self.sources), tensor, platform)
        encoder = self._activations(rows, self.sources, self.sources, tensor, platform) if self.sources else 0
        return max(encoder, decoder + short_cache + logits)

    def _decode_temporaries(self, rows: int, tensor: int, platform: str) -> int:
        """Activations and logits. With beams, three arrays of the size of the logits are alive at a time."""
        rows *= self.branches  # beams share a row of the cache, but each has logits and activations
        slots = max(self.slots, self.sources)  # the layers attend to one after the other
        logits = 4 * rows * self.step_columns * self.config.vocab_size
        alive = 1 if self.branches == self.step_columns == 1 else 3
        return logits * alive + self._activations(rows, self.step_columns, slots, tensor, platform)

    def _activations(self, rows: int, columns: int, slots: int, tensor: int, platform: str) -> int:
        itemsize = max(self.dtype.itemsize, 4) if platform == "cpu" else self.dtype.itemsize  # XLA:CPU uses float32
        return self.family.activation_bytes(self.config, ForwardPass(rows, columns, slots, itemsize, tensor, platform))


class _Assistant(NamedTuple):
    """What drafts the tokens of a call, with the sizes of the same call by itself."""

    name: str
    call: _Call
    quantize: str | None


def _suggestions(call: _Call, setup: _Setup) -> Iterator[Plan]:
    """The smallest change of each kind that makes the call fit; if none does, of two kinds together, then of three."""
    # A quantised copy drafts for a model in full.
    in_full = call.assistant is not None and call.assistant.quantize is not None
    smaller = {None: QUANTIZATIONS, "int8": ("int4",), "int4": ()}[setup.quantize]
    changes: dict[str, Sequence[object]] = {
        "batch": _smaller_batches(setup.batch, setup.mesh[0]),
        "quantize": () if in_full else smaller,
        "mesh": _larger_meshes(call, setup.mesh),
        "device": [device for device in map(_usable, _DEVICES.values()) if device.memory > setup.device.memory],
    }
    fitting = False
    for count in range(1, 4):
        for names in itertools.combinations(changes, count):
            for values in itertools.product(*(changes[name] for name in names)):
                plan = call.on(setup._replace(**dict(zip(names, values, strict=True))))
                if plan.fits:
                    fitting = True
                    yield plan
                    break
        if fitting:
            return


def _smaller_batches(batch: int, data: int) -> list[int]:
    """Smaller batches, each a full bucket on every device, the largest first."""
    sizes, size = [], bucket(-(-batch // data))
    while size > 1:  # 2**n -> 3/4 * 2**n -> 2**(n - 1)
        size = size * 2 // 3 if size % 3 == 0 else size * 3 // 4
        sizes.append(size * data)
    return sizes


def _larger_meshes(call: _Call, mesh: tuple[int, int]) -> list[tuple[int, int]]:
    """Meshes with more devices: "data" doubled, "tensor" wherever the weights divide evenly; the smallest first."""
    tensors = [size for size in range(mesh[1], _MOST_DEVICES + 1) if call.spreads(size)]
    datas = [mesh[0] << doubling for doubling in range(9)]
    meshes = [(data, tensor) for tensor in tensors for data in datas if data * tensor <= _MOST_DEVICES]
    return sorted((larger for larger in meshes if larger != mesh), key=lambda mesh: (math.prod(mesh), -mesh[1]))


def _spread(tensor: int) -> AbstractMesh:
    return AbstractMesh((1, tensor), ("data", "tensor"))

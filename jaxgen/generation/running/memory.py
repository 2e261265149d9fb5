"""Checks whether a call fits into memory, by the arrays that it certainly holds."""

import os

import jax

from jaxgen.generation.call import PreparedCall


def check_memory(prepared: PreparedCall) -> None:
    """Raises ValueError if the arrays of a call exceed the memory. Called before anything is compiled."""
    model, call, config, mode = prepared.model, prepared.call, prepared.config, prepared.mode
    prompt_slots, cache_slots = call.prompt_slots, prepared.cache_slots
    rows, steps = call.model_rows * call.strategy.copies, call.slots - call.prompt.input_ids.shape[1]
    needed = {
        "the weights": _bytes(model, call.strategy),
        "the cache": rows * cache_slots * prepared.cache_bytes_per_token,
    }
    if size := call.strategy.bytes_of_caches(call.prompt, steps):
        needed["the cache of the assistant"] = size
    source = prepared.inputs.source
    columns = 0 if source is None else source.bucket
    if source is not None:
        # Keys and values of each layer of the decoder, as in the cache. Rows of one prompt share them.
        needed["the source"] = call.model_rows * columns * model.cache_bytes_per_token
    scored = call.model_rows * mode.sequences_per_prompt
    for name in config.outputs:
        if name in prepared.intermediates:
            of_prompt = call.model_rows * model.intermediates_bytes(name, prompt_slots, prompt_slots)
            of_step = rows * model.intermediates_bytes(name, call.strategy.branches, cache_slots)
            needed[f"`output_{name}`"] = of_prompt + steps * of_step
            if not config.use_cache:
                width = prepared.prompt_length + steps
                texts = (
                    steps if mode.whole_texts_per_step else 1
                )  # without beams all steps share the arrays of the last one
                needed[f"`output_{name}`"] += scored * texts * model.intermediates_bytes(name, width, width)
            if name == "attentions" and source is not None:
                of_prompt = call.model_rows * model.intermediates_bytes("cross_attentions", prompt_slots, columns)
                of_step = rows * model.intermediates_bytes("cross_attentions", call.strategy.branches, columns)
                needed["`cross_attentions`"] = of_prompt + steps * of_step
            if (of_encoder := f"encoder_{name}") in prepared.intermediates:
                needed[f"`{of_encoder}`"] = call.model_rows * model.intermediates_bytes(of_encoder, columns, columns)
        else:
            # float32, hence 4 bytes
            needed[f"`output_{name}`"] = 4 * scored * steps * model.vocab_size
    available = memory_bytes() * (1 if model.mesh is None else model.mesh.size)
    place = "the device has" if model.mesh is None else "the devices have"
    if sum(needed.values()) > available:
        parts = ", ".join(f"{size / 1e9:,.1f} GB for {name}" for name, size in needed.items())
        raise ValueError(
            f"{scored} rows of {call.slots} tokens need {parts}, but {place} {available / 1e9:,.1f} GB. Lower "
            "`max_new_tokens`, the prompt length or the batch"
            + (", or ask for fewer outputs." if config.outputs else ".")
        )


def _bytes(*trees: object) -> int:
    """The bytes of their arrays, each counted once: an assistant may share those of the model."""
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())


def memory_bytes() -> int:
    """The memory of a device in bytes; for a CPU, the machine's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Spreads a model over eight virtual devices in many ways, and compares its tokens with those of one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/helpers/meshes.py FOLDER CALLS

CALLS is a JSON list of [data, tensor, arguments]; the prompts are ragged, two or as many as an argument "rows" says.
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxgen

jax.config.update("jax_default_matmul_precision", "highest")


# Parts of the names of what every device has all of.
WHOLE = ("norm", "o_proj.bias", "down_proj.bias", "fc2.bias", "embed_positions", "relative_attention_bias")
WHOLE += ("final_logits_bias",)


def prompts(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    mask = np.arange(9) >= rng.integers(0, 8, rows)[:, None]
    return np.where(mask, rng.integers(3, 64, (rows, 9)), 0), mask.astype(int)


def mesh(data: int, tensor: int) -> jax.sharding.Mesh:
    """Axes of one device are left out, so that a mesh of either axis alone is tried too."""
    sizes = {name: size for name, size in {"data": data, "tensor": tensor}.items() if size > 1} or {"tensor": 1}
    devices = np.array(jax.devices()[: data * tensor]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes))


def main(folder: Path, calls: list[tuple[int, int, dict[str, Any]]]) -> None:
    plain = jaxgen.load(folder)
    spread: dict[tuple[int, int], Any] = {}
    for data, tensor, arguments in calls:
        if kind := arguments.pop("quantize", None):
            small = (jaxgen.load(folder, quantize=kind, mesh=each) for each in (None, mesh(data, tensor)))
            np.testing.assert_array_equal(*(jaxgen.generate(model, prompts(2)[0]) for model in small))
            continue
        if (data, tensor) not in spread:
            spread[data, tensor] = jaxgen.load(folder, mesh=mesh(data, tensor))
        ids, mask = prompts(arguments.pop("rows", 2))
        again, assisted = arguments.pop("again", False), arguments.pop("assisted", False)
        # The caller's own mesh, for other code: the model's wins.
        other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        aside = partial(jax.set_mesh, other) if arguments.pop("another mesh", False) else contextlib.nullcontext
        outputs = []
        for model in (plain, spread[data, tensor]):
            options = {"max_new_tokens": 12, "return_dict_in_generate": True} | arguments
            if assisted and model is not plain:
                options |= {"assistant_model": model, "num_assistant_tokens": 3}
            with aside():
                output = jaxgen.generate(model, ids, attention_mask=mask, **options)
            if again:
                sequences = output.sequences
                longer = np.pad(mask, ((0, 0), (0, sequences.shape[1] - mask.shape[1])), constant_values=1)
                past = output.cache
                output = jaxgen.generate(model, sequences, attention_mask=longer, cache=past, **options)
            outputs.append(output.sequences)
        np.testing.assert_array_equal(*outputs, err_msg=f"{data} {tensor} {arguments}")
    for (_, tensor), model in spread.items():
        check_places(model, tensor)
    jaxgen.save(spread[max(spread, key=lambda sizes: sizes[1])], folder / "saved")
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(jaxgen.load(folder / "saved")), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def check_places(model: Any, tensor: int) -> None:
    """Every device has its share of what is spread, and all of the rest."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        share = leaf.addressable_shards[0].data.size
        few = getattr(model.config, "num_key_value_heads", tensor) % tensor
        whole = any(part in name for part in (*WHOLE, *(("qkv_proj.bias",) if few else ())))
        assert share == leaf.size // (1 if whole else tensor), (name, share, leaf.size)
        assert leaf.sharding.mesh == model.mesh


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

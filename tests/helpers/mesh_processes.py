"""One of several processes whose devices are one mesh: it loads, makes and saves models, and prints what it finds.

    python tests/helpers/mesh_processes.py FOLDER PORT NUMBER COUNT DEVICES CHECK...

FOLDER holds checkpoints of one model by their formats, and the ones that a check names. Each process has DEVICES
devices. The last line is {check: what it returned}.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxgen

IDS = np.array([[5, 6, 7, 9], [3, 4, 8, 5]], np.int32)


def mesh_of(order: list[int] | None = None, data: int = 1) -> Mesh:
    """All devices in an order, the axis "tensor" last."""
    devices = np.array(jax.devices())[order or [*range(jax.device_count())]]
    return Mesh(devices.reshape(data, -1), ("data", "tensor"))


@cache
def forward(mesh: Mesh | None) -> Any:
    everywhere = mesh and NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda model, ids: model(ids), out_shardings=everywhere)


def logits(model: Any) -> np.ndarray:
    return np.asarray(forward(model.mesh)(model, IDS))


def is_close(model: Any, plain: Any) -> bool:
    """Whether a model on the mesh computes what one on a device of this process does."""
    return np.allclose(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def bytes_held(model: Any) -> int:
    """Bytes of the shards of this process, each of them once."""
    shards = (
        {str(each.index): each.data.nbytes for each in leaf.addressable_shards} for leaf in jax.tree.leaves(model)
    )
    return sum(sum(each.values()) for each in shards)


def bytes_read() -> int:
    """Bytes that this process has read so far, as the operating system counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def formats(folder: Path) -> dict[str, bool]:
    """Whether a model of each format is right on the mesh."""
    plain = jaxgen.load(folder / "file")
    return {
        name: is_close(jaxgen.load(folder / name, mesh=mesh_of()), plain) for name in ("file", "files", "converted")
    }


def meshes(folder: Path) -> list[bool]:
    """Meshes of all kinds; in one of them the shards of a process are not neighbours."""
    plain, count = jaxgen.load(folder / "file"), jax.device_count()
    apart = [*range(0, count, 2), *range(1, count, 2)]
    explicit = Mesh(np.array(jax.devices()).reshape(1, count), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    found = [
        is_close(jaxgen.load(folder / "file", mesh=each), plain) for each in (mesh_of(apart), mesh_of(data=2), explicit)
    ]
    with jax.set_mesh(explicit):
        model = jaxgen.load(folder / "file", mesh=mesh_of())
    return [*found, is_close(model, plain)]


def reads(folder: Path) -> dict[str, float]:
    """Bytes read while a model is loaded, for each byte of the process' shards."""
    ratios = {}
    for name, order in {"file": None, "converted": None, "apart": [0, 2, 1, 3]}.items():
        large = folder / "large" / ("file" if name == "apart" else name)
        before = bytes_read()
        model = jaxgen.load(large, mesh=mesh_of(order))
        ratios[name] = (bytes_read() - before) / bytes_held(model)
        assert bytes_held(model) < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return ratios


def computed(folder: Path) -> dict[str, bool]:
    """Models whose rows are computed, and those that are cast or quantised here."""
    spread = {"mesh": mesh_of()}
    pairs = {
        name: (jaxgen.load(folder / name, **options, **spread), jaxgen.load(folder / name, **options))
        for name, options in {"float8": {}, "model.gguf": {}, "file": {"quantize": "int8"}}.items()
    }
    found = {name: is_close(*pair) for name, pair in pairs.items()}
    short = jaxgen.load(folder / "file", "bfloat16", mesh_of())
    wide = jaxgen.load(folder / "file", mesh=mesh_of())
    equal = [
        np.asarray(one.data).tobytes() == np.asarray(other.data.astype("bfloat16")).tobytes()
        for pair in zip(*map(jax.tree.leaves, (short, wide)), strict=True)
        for one, other in zip(*(leaf.addressable_shards for leaf in pair), strict=True)
    ]
    return found | {"cast": all(equal)}


def random(folder: Path) -> list[bool]:
    """Whether random weights on the mesh are those of one device, and each device has its share of them."""
    config = json.loads((folder / "file" / "config.json").read_text())
    model = jaxgen.from_config(config, jax.random.key(7), mesh=mesh_of())
    shares = {leaf.addressable_shards[0].data.size * jax.device_count() // leaf.size for leaf in jax.tree.leaves(model)}
    jaxgen.save(model, folder / "random")
    return [1 in shares, same_bits(jaxgen.load(folder / "random"), jaxgen.from_config(config, key=7))]


def random_int8(folder: Path) -> list[bool]:
    """Whether that is so of random weights in int8."""
    config = json.loads((folder / "file" / "config.json").read_text())
    return [is_close(*(jaxgen.from_config(config, 7, quantize="int8", mesh=each) for each in (mesh_of(), None)))]


def save(folder: Path) -> dict[str, Any]:
    """The files of a folder that all processes write, and whether they hold the model."""
    plain = jaxgen.load(folder / "file")
    jaxgen.save(jaxgen.load(folder / "converted", mesh=mesh_of()), folder / "saved")
    there = sorted(path.name for path in (folder / "saved").iterdir())
    sizes = [path.stat().st_size for path in sorted((folder / "saved").glob("*.safetensors"))]
    even = max(sizes) < 1.5 * min(sizes)
    return {"files": there, "even": even, "same": same_bits(jaxgen.load(folder / "saved"), plain)}


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(left).tobytes() == np.asarray(right).tobytes() for left, right in pairs)


def refusals(folder: Path) -> dict[str, str]:
    """What a process says whose own file, or that of another, cannot be written."""
    model, said = jaxgen.load(folder / "file", mesh=mesh_of()), {}
    for name in ("full", "taken", "file"):
        try:
            jaxgen.save(model, folder / name)
        except (OSError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    try:
        other = jax.devices()[0 if jax.process_index() else -1]
        jaxgen.load(folder / "file", mesh=Mesh(np.array([other]), ("tensor",)))
    except ValueError as error:
        said["mesh"] = str(error)
    return said


def main(folder: Path, port: int, number: int, count: int, devices: int, checks: list[str]) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    assert (jax.device_count(), jax.local_device_count()) == (count * devices, devices)
    functions = (formats, meshes, reads, computed, random, random_int8, save, refusals)
    jaxgen.load(folder / "file")  # whatever it imports
    print(json.dumps({each.__name__: each(folder) for each in functions if each.__name__ in checks}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]), sys.argv[6:])

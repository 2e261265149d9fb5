"""`jaxgen doctor`: what is installed, where it runs, and what is known to go wrong with it."""

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxgen.cli import compile_cache
from jaxgen.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "safetensors", "numpy", "torch")


def run(arguments: argparse.Namespace) -> int:
    versions = {name: _version(name) for name in _PACKAGES}
    print(f"jaxgen {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages   " + ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items()))
    try:
        devices = jax.local_devices()
        print(f"devices    {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})" + _memory(devices[0]))
        troubles = hazards(versions, jax.default_backend())
    except (RuntimeError, AssertionError) as error:  # either, by what is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        advice = f"JAX_PLATFORMS={platforms} asks for what is not there. Unset it." if platforms else "Reinstall jax."
        troubles = [f"JAX finds no device{f' ({error})' if str(error) else ''}. {advice}", *hazards(versions, "none")]
    try:
        print("programs   " + _programs(compile_cache.enable(arguments.compile_cache)))
    except (OSError, ValueError) as error:
        troubles.append(str(error))
    for trouble in troubles:
        print(f"trouble    {trouble}")
    if not troubles:
        print("trouble    none known")
    return 1 if troubles else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory(device: Any) -> str:
    stats = device.memory_stats() if device.platform != "cpu" else None
    return f", {stats['bytes_limit'] / 1e9:.1f} GB" if stats else ""


def _programs(folder: Path | None) -> str:
    if folder is None:
        return "not kept"
    files = [file for file in folder.iterdir() if file.is_file()]
    return f"kept in {folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def hazards(versions: dict[str, str | None], backend: str, nvidia: bool | None = None) -> list[str]:
    """What is known to go wrong with these versions on this machine, and the way out.

    Args:
        versions: by package; None for one that is missing.
        backend: of JAX.
        nvidia: whether the machine has such a GPU; looked up by default.
    """
    found = []
    numbers = {name: _numbers(text) for name, text in versions.items() if text}
    if numbers["flax"] == (0, 12, 11):
        found.append("flax 0.12.11 is broken. Install another: pip install 'flax>=0.12.12'")
    if numbers["jax"] >= (0, 11) and numbers["flax"] < (0, 12, 12):
        found.append(
            f"flax {versions['flax']} does not work with jax {versions['jax']}. Install: pip install 'flax>=0.12.12'"
        )
    if versions["jax"] and versions["jaxlib"] and numbers["jax"][:2] != numbers["jaxlib"][:2]:
        found.append(f"jax {versions['jax']} and jaxlib {versions['jaxlib']} do not belong together. Reinstall jax.")
    if not (5, 5) <= numbers["transformers"] < (6,):
        found.append(
            f"transformers {versions['transformers']} is untested. Install: pip install 'transformers>=5.5,<6'"
        )
    nvidia = Path("/proc/driver/nvidia/version").exists() if nvidia is None else nvidia
    if nvidia and backend == "cpu":
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            found.append("JAX_PLATFORMS=cpu keeps JAX off the NVIDIA GPU. Unset it.")
        elif importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin"):
            found.append("JAX has its CUDA plugin but does not see the NVIDIA GPU: the driver may be too old for it.")
        else:
            found.append("there is an NVIDIA GPU, but JAX for the CPU only. Install: pip install 'jaxgen[cuda13]'")
    if jax.config.values["jax_enable_x64"]:
        found.append("jax_enable_x64 makes some numbers 64 bits wide, which no test covers. Unset JAX_ENABLE_X64.")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """(0, 12, 8) of "0.12.8.dev1+local"."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)

"""`jaxgen doctor`: installed versions, devices, and known problems with them."""

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import jax
from packaging.requirements import Requirement
from packaging.version import Version

from jaxgen.cli import compile_cache
from jaxgen.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "safetensors", "numpy", "torch")


def run(arguments: argparse.Namespace) -> int:
    versions = {name: _version(name) for name in _PACKAGES}
    print(f"jaxgen {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages   " + ", ".join(f"{name} {installed or 'missing'}" for name, installed in versions.items()))
    try:
        devices = jax.local_devices()
        print(f"devices    {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})" + _memory(devices[0]))
        troubles = hazards(versions, jax.default_backend())
    except (RuntimeError, AssertionError) as error:  # JAX raises either, depending on what is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        advice = (
            f"JAX_PLATFORMS={platforms} names a platform that is not available. Unset it."
            if platforms
            else "Reinstall jax."
        )
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
    """Known problems with these versions on this machine, each with a fix.

    Args:
        versions: by package; None for a missing one.
        backend: JAX's default backend.
        nvidia: whether the machine has an NVIDIA GPU; looked up by default.
    """
    troubles: list[str] = []
    known = {name: Version(text) for name, text in versions.items() if text}
    for requirement in _requirements():
        installed, bounds = known.get(requirement.name), requirement.specifier
        if installed and not bounds.contains(installed, prereleases=True):
            # A version that a bound excludes by name is known not to work.
            word = "broken" if f"!={installed.public}" in map(str, bounds) else "untested"
            troubles.append(f"{requirement.name} {installed} is {word}. Install: pip install '{requirement}'")
    jax_series, flax = known["jax"].release[:2], known["flax"]
    if jax_series >= (0, 11) and flax < Version("0.12.12"):
        troubles.append(f"flax {flax} does not work with jax {known['jax']}. Install: pip install 'flax>=0.12.12'")
    if "jaxlib" in known and jax_series != known["jaxlib"].release[:2]:
        troubles.append(f"jax {known['jax']} and jaxlib {known['jaxlib']} do not match. Reinstall jax.")
    nvidia = Path("/proc/driver/nvidia/version").exists() if nvidia is None else nvidia
    if nvidia and backend == "cpu":
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            troubles.append("JAX_PLATFORMS=cpu keeps JAX off the NVIDIA GPU. Unset it.")
        elif importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin"):
            troubles.append(
                "JAX has its CUDA plugin but does not see the NVIDIA GPU: the driver may be too old for it."
            )
        else:
            troubles.append(
                "there is an NVIDIA GPU, but JAX is installed for the CPU only. Install: pip install 'jaxgen[cuda13]'"
            )
    return troubles


def _requirements() -> list[Requirement]:
    """The requirements of the installed jaxgen; none if it runs from a folder without being installed."""
    try:
        requirements = [Requirement(line) for line in requires("jaxgen") or ()]
    except PackageNotFoundError:
        return []
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]

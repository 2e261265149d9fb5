"""Which of XLA's flags the installed version knows."""

import os
import subprocess
import sys


def known(*flags: str) -> str:
    """Those of the flags that it knows. It ends a process that has another, so a process of its own has to ask."""
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    asked = subprocess.run(ask, env=os.environ | {"XLA_FLAGS": " ".join(flags)}, capture_output=True, text=True)
    return " ".join(flag for flag in flags if not asked.returncode or flag not in asked.stderr)

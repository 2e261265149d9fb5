"""What Python imports first in the processes that tests start: they find no torch.

transformers imports torch where it finds it, and that takes longer than most of what these processes do.
"""

import os
import sys

if "TESTS_WITHOUT_TORCH" in os.environ:
    sys.modules["torch"] = None  # type: ignore[assignment]

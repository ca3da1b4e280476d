"""Makes the helpers of the folder above importable: imported first by every file here that uses them."""

import sys
from pathlib import Path

__all__: list[str] = []

sys.path.append(str(Path(__file__).resolve().parent.parent))

"""transformers, where it is installed."""

import sys

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except Exception:  # one of another build than torch's raises whatever it likes, and breaks transformers with it
    sys.modules["torchvision"] = None  # text models need none of it

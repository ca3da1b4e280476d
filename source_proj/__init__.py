"""Which training examples made a model behave as it does: SOURCE in a random-projection feature bank."""

from importlib.metadata import version as _version

from source_proj._io.lazy import lazy_exports as _lazy_exports

__version__ = _version("source-proj")

__getattr__, __dir__, __all__ = _lazy_exports(__name__, __file__)

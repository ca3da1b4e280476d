"""Loads the compiled kernels, where they were built."""

import ctypes

__all__ = ["native_library"]


def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a compiler."""
    return None

"""Settings that the kernels' tests share."""

import ctypes

import pytest
import torch

from source_proj.kernels.native import native_library


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: waking a second thread for them costs far more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def at_level():
    """A function that sets the instruction set which the compiled code may use, for the time of a test."""
    library = native_library()
    highest = None if library is None else ctypes.c_int.in_dll(library, "sp_highest_level")

    def use(level):
        if highest is None or level is None:
            return
        highest.value = level
        if library.sp_level() != level:
            pytest.skip(f"this processor has no level {level}")

    yield use
    if highest is not None:
        highest.value = 2

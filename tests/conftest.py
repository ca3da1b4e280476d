"""Settings that all tests share."""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of theirs, and of their programs, would wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # what takes its time on a busy machine is right all the same
settings.load_profile("untimed")

if not torch.cuda.is_available():  # before triton is imported: its kernels then run on the CPU, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except Exception:  # one of another build than torch's raises whatever it likes, and breaks transformers with it
    sys.modules["torchvision"] = None  # text models need none of it


@pytest.fixture(autouse=True, scope="session")
def no_flush():
    """Flushing guards against power failures, which no test makes; on a busy disk it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_collection_finish():
    """What was imported stays to the end: looking through it for garbage again and again takes its time."""
    gc.freeze()


def pytest_sessionfinish():
    """Libraries' own checks for what is left at the end see it again."""
    gc.unfreeze()

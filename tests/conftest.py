"""Settings that all tests share."""

import os
import sys

import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # what takes its time on a busy machine is right all the same
settings.load_profile("untimed")

if not torch.cuda.is_available():  # before triton is imported: its kernels then run on the CPU, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of their own would wait for each other
    torch.set_num_threads(1)

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except Exception:  # one of another build than torch's raises whatever it likes, and breaks transformers with it
    sys.modules["torchvision"] = None  # text models need none of it

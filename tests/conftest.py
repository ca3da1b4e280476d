"""Settings that all tests share."""

import os

import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels then run on the CPU, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of their own would wait for each other
    torch.set_num_threads(1)

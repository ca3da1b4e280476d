"""Settings that all tests share."""

import os

import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels then run on the CPU, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

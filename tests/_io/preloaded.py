"""Processes that are forked of one that has imported what computing needs, and never computed itself."""

import multiprocessing
from multiprocessing.context import BaseContext

__all__ = ["preloaded"]


def preloaded() -> BaseContext:
    """A context whose processes begin at once, where spawned ones would import torch for seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "source_proj.gradients", "source_proj.bank"])
    return context

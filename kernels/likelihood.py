"""Log-likelihoods of labels where a kernel makes them without log-probabilities of all classes."""

import torch
from torch import Tensor

from .backends import available_backends

__all__ = ["label_likelihood"]


def label_likelihood(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Log p(label) (B, S) float32 at the first S positions of logits (B, T, V), for labels (B, S) int64, 0 to V - 1.

    Differentiable once by the logits. None where no kernel serves: on a CPU, under vmap, in double precision, or for
    logits that do not lie side by side.
    """
    if logits.dtype == torch.float64 or logits.stride(-1) != 1:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(logits):
        return None
    if available_backends(logits.device.type)[0] != "triton":
        return None
    from .triton_likelihood import label_likelihood_triton

    return label_likelihood_triton(logits, labels)

"""Optimizers that are not described, and why: for the messages that refuse them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

__all__ = ["refusal"]

_SIGN = "steps by the sign of the gradient alone, so that a gradient's size moves nothing"
_MATRIX = "multiplies gradients by full matrices, of which no diagonal preconditioner is left"
_OWN_RATE = "finds its learning rate itself, from all gradients, so that no gradient has a step of its own"
_QUANTISED = "keeps its second moments in 8 or 4 bits in a layout of its own"
_LOW_RANK = "steps in low-rank projections of the gradient that it changes on the way and does not keep"
_LAYER = "scales each layer's step by the norms of its weights and its update, whatever a single gradient's size"


class _Refused(NamedTuple):
    """A name's part in lower case, entries of groups or states that give it away, and the reason."""

    part: str
    marks: frozenset[str]
    why: str


def _of(part: str, why: str, marks: str = "") -> _Refused:
    return _Refused(part, frozenset(marks.split()), why)


_REFUSED = (
    _of("galore", _LOW_RANK, "rank update_proj_gap"),
    _of("apollo", _LOW_RANK, "rank update_proj_gap"),
    _of("8bit", _QUANTISED, "state1 state2 qmap1"),
    _of("4bit", _QUANTISED),
    _of("bnb", _QUANTISED),
    _of("paged", _QUANTISED),
    _of("lion", _SIGN),
    _of("signsgd", _SIGN),
    _of("rprop", _SIGN, "etas step_sizes"),
    _of("muon", _MATRIX, "ns_steps"),
    _of("shampoo", _MATRIX),
    _of("soap", _MATRIX, "precondition_frequency"),
    _of("kron", _MATRIX),
    _of("lbfgs", _MATRIX, "history_size"),
    _of("lamb", _LAYER, "grad_averaging trust_clip"),
    _of("lars", _LAYER, "trust_coeff"),
    _of("prodigy", _OWN_RATE, "d d0 d_coef"),
    _of("dadapt", _OWN_RATE, "d d0"),
    _of("adadelta", "takes the size of its steps from its former steps", "acc_delta"),
    _of("asgd", "averages its weights with decaying rates of its own", "lambd t0"),
    _of("ademamix", "keeps a second, much slower mean of gradients that has no settled size within a run", "alpha_t"),
    _of("grokadamw", "amplifies slow gradients by a factor that depends on the loss"),
    _of("adalomo", "fuses its steps into the backward pass, and keeps no state that can be read"),
    _of("lomo", "fuses its steps into the backward pass, and keeps no state that can be read"),
    _of("stable_adamw", "clips each parameter's update by a root mean square that it does not keep"),
    _of("stableadamw", "clips each parameter's update by a root mean square that it does not keep"),
)


def refusal(names: Collection[str], keys: Collection[str]) -> str:
    """Say why an optimizer is not described: what its class or option names give away, or the names of its entries.

    Args:
        names: a class's or a Trainer's name for it, if any.
        keys: options and entries of its state.

    Returns:
        A clause that begins with a comma; nothing if it is not known.
    """
    for refused in _REFUSED:
        if any(refused.part in name.lower() for name in names) or (refused.marks and refused.marks <= set(keys)):
            return f", which {refused.why}"
    return ""

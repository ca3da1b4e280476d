"""The law that every row is held to, and what the rows of a bank rest on.

For any weights w, the rows of a batch must satisfy

    Σ_b w_b row_b = R ∇ Σ_b w_b f_b,

whose right side is a plain backward pass through the model as it is, over one half of the batch and then the other, so
that examples which depend on each other are seen, too. With random weights no mistake can pass but by
a chance of measure nearly zero: rows that are missed, cut at the wrong places, permuted, or doubled. The weights even
out the lengths of the rows, so that an example with a small gradient counts as much as any.

The law is asserted where a proof has gaps: `Proof` says where.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj.gradients.batches import Batch
from source_proj.gradients.sink import (
    GradientSink,
    HandingSink,
    ScaledSink,
    SinkByParameter,
    SinkOfMetrics,
    WeightedSink,
    weighted_sum,
)
from source_proj.gradients.space import ParameterSpace
from source_proj.sketch import Sketch
from source_proj.trajectory import Scale

__all__ = [
    "Audit",
    "Expected",
    "Proof",
    "Refuted",
    "WatchedSink",
    "audited",
    "drawn",
    "gradient_sink",
    "law_weights",
    "share_sink",
]

# The law is about structure, not rounding: what is missed or mixed up is off by its whole size. Right rows agree to
# about 1e-6 in float32. The floor is for parameters whose gradient is zero but for rounding, as that of key biases.
_TOLERANCE, _BY_PARAMETER, _FLOOR = 1e-3, 1e-2, 1e-4
_ROUNDINGS = 8  # of the coarsest number format that took part
_SKETCH = Sketch(dim=256)  # of each parameter by itself, so that an error names it
_OCTAVES = 3  # over which the weights' sizes are spread
_EVENED = 2.0**10  # weights even out lengths of rows up to this ratio
_SAMPLED = 128  # one batch in so many is audited for no other reason


class Refuted(GradientError):
    """The law failed, and rows that were given before rest on the same proof: make them again, all since `begin`.

    The engine has turned to the general path, so that the same calls succeed now.
    """


def drawn(*words: object) -> int:
    """A 64-bit number, a pure function of what it is drawn for."""
    text = " ".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


@dataclass(frozen=True)
class Audit:
    """One assertion of the law.

    Attributes:
        error: relative error of the weighted sum of rows.
        wrong: parameters whose share is wrong.
        touched: parameters whose share was not zero.
        passed: whether the law holds.
        values_differ: whether the values themselves differ between the two passes.
    """

    error: float
    wrong: list[str]
    touched: set[str]
    passed: bool
    values_differ: bool = False


@dataclass
class _Known:
    """What was proven of one function."""

    signatures: set[tuple[object, ...]] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    batches: int = 0


class Proof:
    """What the rows of a scope (one shard at one checkpoint, or one set of queries) rest on.

    A batch is audited if it is the first of its function, if a counter-based draw says so, if its structure was not
    proven yet or cannot be followed, or if it is the first in which some parameter's gradient is not zero. Of others
    the values alone are compared with those of their halves now and then (`batches.is_compared`). Nothing is taken
    over from another scope: what a scope holds, and what is noted of it, is the same in whatever order scopes are made,
    by whomever.

    Args:
        key: numbers that name the scope; they decide the weights and the sample.

    Attributes:
        refused: structures that cannot be followed, and of which a batch failed; and why.
        general: the rest of the scope goes by the general path.
        apart: in the rest of the scope each function has a forward pass of its own.
        served: batches that rest on this proof were given.
    """

    def __init__(self, *key: int) -> None:
        self._key = key
        self._known: dict[str, _Known] = {}
        self._reasons: Counter[str] = Counter()
        self._audited = self._examples = self._audited_examples = 0
        self._worst = 0.0
        self.refused: dict[tuple[object, ...], str] = {}
        self.general = False
        self.apart = False
        self.served = False

    def next_batch(self, name: str) -> int:
        """The number of this batch among those of a function."""
        known = self._of(name)
        known.batches += 1
        return known.batches - 1

    def is_due(self, name: str, batch: int) -> bool:
        """Whether this batch is audited whatever it looks like."""
        return not self._of(name).signatures or self.draw(name, batch) % _SAMPLED == 0

    def draw(self, name: str, batch: int) -> int:
        """A 63-bit number, a pure function of scope, function and batch."""
        return drawn(self._key, name, batch) >> 1

    def unproven(self, name: str, names: Sequence[str]) -> set[str]:
        """Parameters of which no gradient but zero was ever audited."""
        return set(names) - self._of(name).parameters

    def covers(self, name: str, signature: tuple[object, ...], touched: set[str]) -> bool:
        """Whether batches of this structure, with gradients of these parameters, were audited."""
        known = self._of(name)
        return signature in known.signatures and touched <= known.parameters

    def add(self, name: str, signature: tuple[object, ...] | None, audit: Audit) -> None:
        """Take an audit that passed into the proof; without a signature it speaks for its own batch alone."""
        if signature is not None:
            self._of(name).signatures.add(signature)
        self._of(name).parameters |= audit.touched

    def note(self, size: int, reason: str | None, audit: Audit | None) -> None:
        """Note a batch that was given: why it went by the general path (None: by hooks), and its audit."""
        self._examples += size
        self.served = True
        if reason is not None:
            self._reasons[reason] += size
        if audit is not None:
            self._audited += 1
            self._audited_examples += size
            self._worst = max(self._worst, audit.error)

    def restarted(self, *, general: bool) -> Proof:
        """The proof of the same scope made again: by the general path, or with functions apart."""
        again = Proof(*self._key)
        again.general, again.apart = general, not general
        return again

    def summary(self) -> dict[str, object]:
        """What was audited, JSON-able: the same for the same scope, whoever made it."""
        return {
            "examples": self._examples,
            "audited_batches": self._audited,
            "audited_examples": self._audited_examples,
            "worst_error": float(f"{self._worst:.1e}"),
            "general": dict(self._reasons),
        }

    def _of(self, name: str) -> _Known:
        return self._known.setdefault(name, _Known())


class WatchedSink(HandingSink):
    """Hands everything to a sink, and what belongs to watched parameters to a second one too; that holds none back."""

    def __init__(self, sink: GradientSink, second: SinkByParameter, watched: set[str]) -> None:
        super().__init__(sink)
        self._second, self._watched = second, watched

    def _sinks(self, name: str) -> list[GradientSink]:
        return [self._sink, self._second] if name in self._watched else [self._sink]

    def add(self, name: str, rows: Tensor, start: int = 0) -> None:
        """As `GradientSink.add`."""
        for sink in self._sinks(name):
            sink.add(name, rows, start)

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0) -> None:
        """As `GradientSink.outer`."""
        for sink in self._sinks(name):
            sink.outer(name, left, right, start)

    def windows(self, name: str, left: Tensor, right: Tensor, taps: Tensor, windows: Tensor) -> None:
        """As `GradientSink.windows`."""
        for sink in self._sinks(name):
            sink.windows(name, left, right, taps, windows)

    def scatter(self, name: str, index: Tensor, values: Tensor) -> None:
        """As `GradientSink.scatter`."""
        for sink in self._sinks(name):
            sink.scatter(name, index, values)


def gradient_sink(
    outs: list[Tensor], sketch: Sketch, space: ParameterSpace, scales: Sequence[Scale | None]
) -> GradientSink:
    """A sink for rows R W D g, for one or several diagonal matrices D, and the space's weights W."""
    sinks: list[GradientSink] = [
        GradientSink(out, sketch, space) if scale is None else ScaledSink(out, sketch, space, scale.to(out.device))
        for out, scale in zip(outs, scales, strict=True)
    ]
    sink = sinks[0] if len(sinks) == 1 else SinkOfMetrics(sinks, outs, sketch, space)
    return sink if space.weights is None else WeightedSink(sink, space)


def share_sink(size: int, space: ParameterSpace, device: torch.device) -> SinkByParameter:
    """A sink that keeps each parameter's share of the rows apart, in a small sketch of its own."""
    return SinkByParameter(size, _SKETCH, space, device)


def law_weights(draw: int, rows: Tensor, evened: bool) -> Tensor:
    """Weights (B,) of the law, of random signs and all of different size.

    Args:
        draw: the seed.
        rows: (B, k); the weights divide by their lengths.
        evened: False where the gradients' number format has no room for that.
    """
    generator, size = torch.Generator().manual_seed(draw), len(rows)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").float() * 2 - 1
    # Strata: no two examples have nearly the same weight, as rows that change places would not be seen then.
    strata = torch.randperm(size, generator=generator, device="cpu").float()
    strata += torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") / 2
    exponents = _OCTAVES * strata / max(size, 1)
    if evened:
        lengths = rows.norm(dim=1).cpu()
        largest = float(lengths.max()) if size else 0.0
        if largest > 0 and isfinite(largest):
            exponents -= lengths.clamp(min=largest / _EVENED).log2()
    return signs * exponents.exp2()


class Expected:
    """What rows must sum to: sketches of ∇ Σ_b w_b f_b, parameter by parameter as they come.

    Args:
        like: for each metric, rows (B, k) on the device of the sums.
        sketch: the projection R.
        space: the attributed parameters.
        scales: of the metrics.
    """

    def __init__(
        self, like: Sequence[Tensor], sketch: Sketch, space: ParameterSpace, scales: Sequence[Scale | None]
    ) -> None:
        self.device = like[0].device
        self.sums = [torch.zeros(1, sketch.dim, device=self.device, dtype=torch.float32) for _ in like]
        self.shares = share_sink(1, space, self.device)
        self._sink = gradient_sink(self.sums, sketch, space, scales)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a parameter's gradient, or a part of it."""
        for sink in (self._sink, self.shares):
            sink.add(name, gradient.to(self.device).unsqueeze(0))


def audited(
    weights: Tensor, rows: Sequence[Tensor], shares: SinkByParameter, expected: Expected, coarsest: float
) -> Audit:
    """Compare the weighted sums of rows, and of each parameter's share, with the gradient of the weighted sum.

    Args:
        weights: w (B,).
        rows: for each metric (B, k).
        shares: of each parameter, from the same layers.
        expected: of the same weights.
        coarsest: the relative spacing of the coarsest number format that took part.
    """
    weights = weights.to(expected.device)
    errors = [_relative(weights, r, s[0]) for r, s in zip(rows, expected.sums, strict=True)]
    error = float(torch.tensor(errors, dtype=torch.float64, device="cpu").max())  # NaN if any is
    tolerance = max(_TOLERANCE, _ROUNDINGS * coarsest)
    wrong = shares.differing(expected.shares, weights, max(_BY_PARAMETER, tolerance), max(_FLOOR, tolerance / 10))
    touched = shares.touched() | expected.shares.touched()
    return Audit(error, wrong, touched, passed=error <= tolerance and not wrong)


def _relative(weights: Tensor, rows: Tensor, expected: Tensor) -> float:
    """The error of Σ w_b row_b relative to the terms' root sum of squares, or to the sum if that is larger."""
    total, norm = weighted_sum(weights, rows)
    size = max(float(norm), float(expected.norm()))
    return float((total - expected).norm()) / size if size else 0.0


def dependent(name: str, batch: Batch, size: int, audit: Audit) -> str:
    """What to say when rows made one example at a time are not those of the batch."""
    what = "its value" if audit.values_differ else "its gradient"
    rows: list[str] = []
    if isinstance(batch, Mapping):
        rows = [str(k) for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == (size,)]
    shared = (
        f", or one of the entries {rows} is shared by all examples and happens to have {size} rows (give"
        if (len(rows) > 1)
        else ", or a tensor that is shared by all examples happens to have as many rows (give"
    )
    return (
        f"an example's rows must not depend on the other examples of its batch, and {what} does: {name} of "
        f"{size} examples at once and of each alone disagree (error {audit.error:.1e}, parameters "
        f"{audit.wrong[:10]}). Either the model mixes its examples (statistics over the batch, attention between "
        "examples, no_grad for some of them), draws random numbers, clips gradients on their way back (in a hook, or "
        f"a Function), or is in autocast by itself (say so by autocast='bfloat16'){shared} it another shape or batch "
        "size)"
    )

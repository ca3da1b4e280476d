"""The engine: chooses the path of a batch's per-example gradients, proves the rows, and sketches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, SourceProjError
from source_proj._io.numbers import all_finite
from source_proj.gradients.batches import Batch, batch_size, own_copy, square_lists_noted, take, with_own_batch
from source_proj.gradients.evaluation import evaluating
from source_proj.gradients.general import Function, Functions, GeneralPath, first_line
from source_proj.gradients.hooks import HookPath, Structure, alone
from source_proj.gradients.law import AUTOCAST, SAMPLED, Law, Work, require_autocast
from source_proj.gradients.memory import RowMemory
from source_proj.gradients.mixed import MixedPath
from source_proj.gradients.owners import uncovered
from source_proj.gradients.proof import (
    Audit,
    Proof,
    Refuted,
    WatchedSink,
    dependent,
    gradient_sink,
    share_sink,
)
from source_proj.gradients.sink import GradientSink, SinkByParameter
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.spread import DeviceSink, SpreadSink
from source_proj.gradients.suited import Unsuited, refuse_unsuited
from source_proj.sketch import Sketch, plain_modes
from source_proj.trajectory import Scale
from source_proj.trajectory.placement import placement_of

__all__ = ["METHODS", "GradientEngine", "gradient_engine"]

_NOT_OF_HOOKS = (SourceProjError, MemoryError, torch.OutOfMemoryError)
METHODS = ("auto", "hooks", "general")
_OVERFLOW = (
    "the sum of a batch's gradients is not finite (overflow), though each of them is: look at the size of inputs "
    "and weights"
)


def gradient_engine(
    model: nn.Module,
    space: ParameterSpace,
    sketch: Sketch,
    method: str = "auto",
    autocast: str | None = None,
) -> GradientEngine:
    """An engine for sketched per-example gradients.

    Args:
        model: any module; weights may be loaded into it between calls, its structure must stay.
        space: the attributed parameters, made from this model.
        sketch: the projection; `kind="identity"` gives the gradients themselves.
        method: `"hooks"`: one forward and one backward pass for a batch, layer by layer; a model that this cannot
            serve is refused. `"general"`: `torch.func.vmap(grad)`. `"auto"`: hooks where they can serve, else general.
        autocast: `"bfloat16"` or `"float16"` for the forward pass, default none.

    Raises:
        ValueError: an unknown method or autocast type, or an identity sketch of another dim than the space.
        GradientError: `method="hooks"` and no rule covers some parameter's module, or the model mixes its examples.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> space = ParameterSpace.from_model(model)
        >>> engine = gradient_engine(model, space, Sketch(dim=2, kind="identity"))
        >>> values, rows = engine.sketch(lambda model, x: model(x)[:, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> rows
        tensor([[1., 2.],
                [3., 4.]])
        >>> engine.method
        'hooks'
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of {METHODS}")
    require_autocast(autocast)
    if sketch.kind == "identity" and sketch.dim < space.size:
        raise ValueError(
            f"an identity sketch has dim {sketch.dim}, but {space.size} parameters are attributed; set dim to that"
        )
    return GradientEngine(model, space, sketch, method, autocast)


class GradientEngine:
    """Sketched per-example gradients of functions of (model, batch); made by `gradient_engine`.

    Every row is proven, by a law and by structure (`proof.py`, `layout.py`). A batch that the hook path cannot serve,
    or whose rows it proves to get wrong, goes by the general path (`"auto"`) or is an error (`"hooks"`). Examples that
    depend on each other are refused on either path.

    Attributes:
        method: the path of the last batch, `"hooks"` or `"general"`; before the first, the one that will be tried.
        reason: why.
        placement: of the model, whose passes find nothing that others left.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, sketch: Sketch, method: str, autocast: str | None
    ) -> None:
        refuse_unsuited(model)
        self.placement = placement_of(model)
        self.placement.remember()
        self._lockstep = self.placement.lockstep
        self._model = model
        self._space = space
        self._sketch = sketch
        self._may_change = method == "auto" and self.placement.is_whole
        self._law = Law(self.placement, space, sketch, None if autocast is None else AUTOCAST[autocast])
        self._general = GeneralPath(self.placement, space)
        self._memory = RowMemory()
        self._hooks: HookPath | None = None
        self._devices = self.placement.devices(space.names)
        self._shared_known = False
        self._why_general = "asked for"
        if method != "general":
            self._try_hooks()
        elif not self.placement.is_whole:
            raise GradientError(f"the model is {self.placement.kind}, which hooks alone can serve, not {method!r}")
        self.method = "general" if self._hooks is None else "hooks"
        self.begin(0)

    @property
    def reason(self) -> str:
        """Why this path."""
        if self.method == "hooks" and self._hooks is not None:
            return f"{self._hooks.reason}, and the rows are proven"
        return "; ".join(part for part in (self._why_general, self._general.note) if part)

    @property
    def proof(self) -> Proof:
        """What the rows since `begin` rest on."""
        return self._proof

    def begin(self, *key: int) -> None:
        """Begin a scope, with a proof of its own: nothing that was proven before counts.

        Args:
            key: numbers that name the scope; the law's weights and sample follow from them.
        """
        self._proof = Proof(*key)
        self._general.begin()
        if self._hooks is not None:
            self._hooks.begin()
        self._shared_known = False

    def sketch(self, function: Function, batch: Batch, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Values and sketched gradients of function(model, batch), the model in evaluation mode.

        Args:
            function: (model, batch) → (B,) floating point numbers, one per example, each a function of its own example
                alone; it is also called with fewer examples of the batch than were given.
            batch: a tensor, or tuples, lists and mappings of tensors; the first dimension counts examples.
            size: the number of examples B; default: read off the batch.

        Returns:
            values (B,) float32 without graph, and rows (B, dim) float32, rows[b] = R ∇ function(model, batch)[b].

        Raises:
            TypeError: the function returns something else than (B,) numbers.
            GradientError: `method="hooks"` and the hook path proves wrong for this model, or examples depend on each
                other, or a layer's input was modified in place.
            Refuted: rows that were given since `begin` rest on a proof that failed now; call for them again.
        """
        values, (rows,) = self.sketch_scaled(function, batch, [None], size=size)
        return values, rows

    def sketch_scaled(
        self,
        function: Function,
        batch: Batch,
        scales: Sequence[Scale | None],
        name: str = "output",
        size: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Values, and sketches of D ∇ function(model, batch) for several diagonal matrices D, from one backward pass.

        Args:
            function: as for `sketch`.
            batch: as for `sketch`.
            scales: each D, of the parameters of the space and on the model's device; None for the identity.
            name: which function it is; each is proven by itself.
            size: as for `sketch`.

        Returns:
            values (B,), and for each D rows (B, dim) float32, rows[b] = R D ∇ function(model, batch)[b].

        Raises:
            MismatchError: a scale is of other parameters than the space.
            TypeError, GradientError: as for `sketch`.
        """
        (found,) = self.sketch_together([(name, function)], alone(function), batch, scales, size)
        return found

    def sketch_together(
        self,
        functions: Sequence[tuple[str, Function]],
        together: Functions,
        batch: Batch,
        scales: Sequence[Scale | None],
        size: int | None = None,
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """What `sketch_scaled` gives of each of several functions, from one forward pass where hooks can serve.

        Args:
            functions: each with its name, as for `sketch_scaled`.
            together: (model, batch) → the values of all functions, in their order, of one forward pass.
            batch: as for `sketch`.
            scales: as for `sketch_scaled`.
            size: as for `sketch`.

        Returns:
            for each function its values and rows.

        Raises:
            MismatchError, TypeError, GradientError: as for `sketch_scaled`.
        """
        for scale in (each for each in scales if each is not None):
            scale.require(self._space)
        # Sharded weights are gathered for one backward pass.
        if len(functions) > 1 and (self._proof.apart or not self.placement.is_whole):
            return [self.sketch_scaled(each, batch, scales, name, size) for name, each in functions]
        size = batch_size(batch) if size is None else size
        works = [Work(with_own_batch(f), batch, size, list(scales), n, self._proof.next_batch(n)) for n, f in functions]
        with plain_modes(), torch.enable_grad(), evaluating(self._model), square_lists_noted(batch, size):
            if self._hooks is not None and not self._proof.general:
                try:
                    return self._by_hooks(self._hooks, works, together)
                except Exception as problem:
                    if isinstance(problem, _NOT_OF_HOOKS) and not isinstance(problem, Unsuited):
                        raise
                    if len(functions) > 1:  # some backward passes can be made once only: a forward pass for each
                        self._proof.apart = True
                        return self.sketch_together(functions, together, batch, scales, size)
                    # The general path raises it again, if the model and not the hooks are to blame.
                    self._proof.general |= not self._shared_known
                    self._leave_hooks(problem)
            return [self._by_general(work) for work in works]

    def is_detached(self, function: Function, batch: Batch) -> bool:
        """Whether function(model, batch) has no graph that leads to any parameter of the model, attributed or not."""
        parameters = [name for name, p in self._model.named_parameters() if p.is_floating_point()]
        with (
            plain_modes(),
            self.placement.running(parameters),
            torch.enable_grad(),
            evaluating(self._model),
            self._law.autocast()(),
        ):
            return not function(self._model, own_copy(batch)).requires_grad

    def _try_hooks(self) -> None:
        if self._may_change:
            self._hooks = MixedPath(self.placement, self._space)
        elif missing := uncovered(self._model, self._space):
            self._leave_hooks("; ".join(f"{name}: {why}" for name, why in list(missing.items())[:10]))
        else:
            self._hooks = HookPath(self.placement, self._space)

    def _leave_hooks(self, cause: str | Exception) -> None:
        why = str(cause) if isinstance(cause, str | Unsuited) else f"{type(cause).__name__}: {first_line(cause)}"
        if not self._may_change:
            if isinstance(cause, TypeError | ValueError):
                raise cause
            remedy = "use method 'auto' or 'general'"
            if not self.placement.is_whole:
                remedy = f"as it is {self.placement.kind}, leave these parameters out by parameters=['!name', ...]"
            refusal = GradientError(f"the hook path cannot serve this model ({why}); {remedy}")
            raise refusal from (None if isinstance(cause, str) else cause)
        self._why_general = why

    def _by_hooks(
        self, hooks: HookPath, works: Sequence[Work], together: Functions
    ) -> list[tuple[Tensor, list[Tensor]]]:
        proof, lockstep = self._proof, self._lockstep  # what one of the processes must run, all run
        batch, size = works[0].batch, works[0].size
        if lockstep.any(not self._shared_known):
            single, double = (take(batch, some, size) for some in ([0], [0, min(1, size - 1)]))
            hooks.find_shared(works[0].function, single, double)
            self._shared_known = True
        passes = [self._begun(work) for work in works]
        structures: list[Structure] = []

        def admit(found: list[Structure]) -> None:
            for structure in found:
                if structure.signature in proof.refused:
                    raise Unsuited(proof.refused[structure.signature])
            structures.extend(found)

        sinks = [each.sink for each in passes]
        values = hooks.add_to(sinks, with_own_batch(together), batch, size, self._law.autocast(), admit)
        for each in passes:
            each.sink.gather()
        self._law.compare(zip(works, values, strict=True))
        made = zip(passes, values, structures, strict=True)
        audits = [self._proven(hooks, *each, shared=len(works) > 1) for each in made]
        self.method = "hooks"
        for audit in audits:
            proof.note(size, None, audit)
        return [(value, each.outs) for value, each in zip(values, passes, strict=True)]

    def _begun(self, work: Work) -> _Pass:
        """What a batch's gradients go to: the rows, and each parameter's own share where the law is due or new."""
        due = self._lockstep.any(self._proof.is_due(work.name, work.number))
        watched = set(self._space.names) if due else self._proof.unproven(work.name, self._space.names)
        return _Pass(work, due, watched, *self._sinks(work, watched))

    def _proven(
        self, hooks: HookPath, made: _Pass, values: Tensor, structure: Structure, *, shared: bool
    ) -> Audit | None:
        """Assert the law where it is due, or where the batch went through the layers as none did before."""
        proof, lockstep, work, shares = self._proof, self._lockstep, made.work, made.shares
        signature = structure.signature if structure.lost is None else None
        touched = shares.touched() if shares is not None else set()
        if not lockstep.any(made.due or signature is None or not proof.covers(work.name, signature, touched)):
            return None
        if lockstep.any(shares is None or made.watched != set(self._space.names)):
            _, shares, sink = self._sinks(replace(work, scales=[]), set(self._space.names))
            hooks.add_to([sink], alone(work.function), work.batch, work.size, self._law.autocast())
            sink.gather()
        assert shares is not None
        audit = self._law.audit(proof, work, values, made.outs, shares)
        if audit is not None and not audit.passed:
            self._refute(structure, audit, shared=shared)
        if audit is not None:
            proof.add(work.name, signature, audit)
        return audit

    def _refute(self, structure: Structure, audit: Audit, *, shared: bool) -> None:
        where = f"parameters {audit.wrong[:10]}" if audit.wrong else "the rows' weighted sum"
        after = f", and {structure.lost} loses sight of the examples" if structure.lost else ""
        distance = f"{audit.error:.1e}" if isfinite(audit.error) else "what is not finite (overflow)"
        why = f"rules and plain autograd disagree on {where} by {distance}{after}"
        if structure.lost is not None and not shared:  # no other batch rests on this one's proof
            self._proof.refused[structure.signature] = why
            raise Unsuited(why)
        if not shared:
            self._leave_hooks(why)
        served, self._proof = self._proof.served, self._proof.restarted(general=not shared)
        if served:
            raise Refuted(f"{why}; rows that were given before rest on the same proof: make them again")
        raise Unsuited(why)

    def _by_general(self, work: Work) -> tuple[Tensor, list[Tensor]]:
        proof = self._proof
        due = proof.is_due(work.name, work.number) or not proof.covers(work.name, (work.size > 1,), set())
        outs, shares, sink = self._sinks(work, set(self._space.names) if due else set())
        values = self._general.add_to(sink, work.function, work.batch, work.size, self._law.autocast())
        sink.gather()
        if not all_finite(values):
            self._law.examine(work, values)
        audit = None
        if due and shares is not None and work.name != SAMPLED:  # rows of one example each, and others drawn than here
            audit = self._law.audit(proof, work, values, outs, shares)
            if audit is not None and not audit.passed:
                finite = isfinite(audit.error)
                raise GradientError(dependent(work.name, work.batch, work.size, audit) if finite else _OVERFLOW)
            if audit is not None:
                proof.add(work.name, (work.size > 1,), audit)
        self.method = "general"
        proof.note(work.size, self.reason, audit)
        return values, outs

    def _sinks(self, work: Work, watched: set[str]) -> tuple[list[Tensor], SinkByParameter | None, GradientSink]:
        """Rows for each scale, shares of the watched parameters, and the sink that adds to both."""
        first = self.placement.device
        parts = {device: self._sinks_on(device, work, watched) for device in dict.fromkeys([first, *self._devices])}
        outs, shares, sink = parts[first]
        if len(parts) > 1:
            sums = {d: [*rows, *([part.sums] if part else [])] for d, (rows, part, _) in parts.items()}
            sink = SpreadSink({d: DeviceSink(each, sums[d]) for d, (_, _, each) in parts.items()})
        return outs, shares, sink

    def _sinks_on(
        self, device: torch.device, work: Work, watched: set[str]
    ) -> tuple[list[Tensor], SinkByParameter | None, GradientSink]:
        outs = [self._memory.zeros(work.size, self._sketch.dim, device) for _ in work.scales]
        shares = share_sink(work.size, self._space, device) if watched else None
        if shares is not None and not outs:
            return outs, shares, shares
        sink = gradient_sink(outs, self._sketch, self._space, work.scales)
        return outs, shares, sink if shares is None else WatchedSink(sink, shares, watched)


@dataclass(frozen=True)
class _Pass:
    """One batch of one function on its way: whether the law is due, whose shares are kept apart, and where all goes."""

    work: Work
    due: bool
    watched: set[str]
    outs: list[Tensor]
    shares: SinkByParameter | None
    sink: GradientSink

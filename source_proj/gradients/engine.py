"""The engine: chooses the path of a model's per-example gradients, proves the choice, and sketches batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError
from source_proj.gradients.batches import Batch, batch_size, map_tensors, take
from source_proj.gradients.general import Autocast, Function, GeneralPath, gradients_of_one
from source_proj.gradients.hooks import HookPath, Unsuited, uncovered
from source_proj.gradients.sink import GradientSink, ScaledSink, SinkByParameter
from source_proj.gradients.space import ParameterSpace
from source_proj.sketch import Sketch

__all__ = ["METHODS", "GradientEngine", "gradient_engine", "nonfinite_examples"]

METHODS = ("auto", "hooks", "general")
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# The proof is about structure, not rounding: a layer that is missed or mixed up is off by its whole size. The floor is
# for gradients that are zero but for rounding, such as those of key biases in attention.
_RELATIVE, _FLOOR = 1e-2, 1e-4
_PROOF = Sketch(dim=1024)


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
    if autocast is not None and autocast not in _AUTOCAST:
        raise ValueError(f"autocast {autocast!r} is unknown; choose one of {tuple(_AUTOCAST)} or None")
    if sketch.kind == "identity" and sketch.dim < space.size:
        raise ValueError(
            f"an identity sketch has dim {sketch.dim}, but {space.size} parameters are attributed; set dim to that"
        )
    return GradientEngine(model, space, sketch, method, autocast)


class GradientEngine:
    """Sketched per-example gradients of functions of (model, batch); made by `gradient_engine`.

    The hook path is proven before it is used: on the first two examples, its gradients must equal those of one plain
    backward pass per example, parameter by parameter. So parameters that are used outside of their module's forward,
    layers that see the examples in another order, and whatever else a rule cannot know lead to the general path
    (`"auto"`) or to an error (`"hooks"`), never to wrong rows.

    Attributes:
        method: the path in use, `"hooks"` or `"general"`; `"auto"` may still change from the first to the second in the
            first call of `sketch`.
        reason: why.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, sketch: Sketch, method: str, autocast: str | None
    ) -> None:
        _refuse_batch_statistics(model)
        self._model = model
        self._space = space
        self._sketch = sketch
        self._may_change = method == "auto"
        self._dtype = None if autocast is None else _AUTOCAST[autocast]
        self._general = GeneralPath(model, space)
        self._hooks: HookPath | None = None
        self._proven_for = 0  # examples that the hook path was compared on
        self._reason = "asked for"
        if method != "general":
            self._try_hooks()

    @property
    def method(self) -> str:
        """The path in use: `"hooks"` or `"general"`."""
        return "general" if self._hooks is None else "hooks"

    @property
    def reason(self) -> str:
        """Why this path."""
        return "; ".join(part for part in (self._reason, self._general.note) if part)

    def sketch(self, function: Function, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values and sketched gradients of function(model, batch), the model in evaluation mode.

        Args:
            function: (model, batch) → (B,) floating point numbers, one per example, each a function of its own example
                alone; it is also called with fewer examples of the batch than were given.
            batch: a tensor, or tuples, lists and mappings of tensors; the first dimension counts examples.

        Returns:
            values (B,) float32 without graph, and rows (B, dim) float32, rows[b] = R ∇ function(model, batch)[b].

        Raises:
            TypeError: the function returns something else than (B,) numbers.
            GradientError: `method="hooks"` and the hook path proves wrong for this model, or a layer's input was
                modified in place.
        """
        values, (rows,) = self.sketch_scaled(function, batch, [None])
        return values, rows

    def sketch_scaled(
        self, function: Function, batch: Batch, scales: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Values, and sketches of D ∇ function(model, batch) for several diagonal matrices D, from one backward pass.

        Args:
            function: as for `sketch`.
            batch: as for `sketch`.
            scales: each D's diagonal (d,) float32 in the coordinates of the space; None for the identity.

        Returns:
            values (B,), and for each D rows (B, dim) float32, rows[b] = R D ∇ function(model, batch)[b].

        Raises:
            MismatchError: a diagonal has another length than the space.
            TypeError, GradientError: as for `sketch`.
        """
        for scale in scales:
            if scale is not None and tuple(scale.shape) != (self._space.size,):
                raise MismatchError(f"a scale has shape {tuple(scale.shape)}; the space has {self._space.size}")
        batch = map_tensors(batch, Tensor.detach)
        size = batch_size(batch)
        with torch.inference_mode(False), torch.enable_grad(), _evaluating(self._model):
            if self._hooks is not None and self._proven_for < min(2, size):
                self._prove(self._hooks, function, batch)
            outs = [torch.zeros(size, self._sketch.dim, device=self._device()) for _ in scales]
            pieces = self._pieces(outs, scales)
            if self._hooks is not None:
                try:
                    return self._hooks.add_to(pieces, function, batch, self._autocast()), outs
                except Unsuited as problem:
                    self._give_up_hooks(str(problem))
                    for out in outs:
                        out.zero_()
            return self._general.add_to(pieces, function, batch, self._autocast()), outs

    def _pieces(self, outs: list[Tensor], scales: Sequence[Tensor | None]) -> GradientSink:
        if len(outs) == 1 and scales[0] is None:
            return GradientSink(outs[0], self._sketch, self._space)
        return ScaledSink(outs, self._sketch, self._space, [None if s is None else s.to(outs[0]) for s in scales])

    def _try_hooks(self) -> None:
        missing = uncovered(self._model, self._space)
        if missing:
            self._give_up_hooks("; ".join(f"{name}: {why}" for name, why in list(missing.items())[:10]))
        else:
            self._hooks = HookPath(self._model, self._space)
            self._reason = "a rule covers every attributed parameter's module"

    def _give_up_hooks(self, why: str) -> None:
        if not self._may_change:
            raise GradientError(f"the hook path cannot serve this model ({why}); use method 'auto' or 'general'")
        self._hooks = None
        self._reason = why

    def _prove(self, hooks: HookPath, function: Function, batch: Batch) -> None:
        """Compare the hook path with plain autograd on two examples (the only one twice, if need be)."""
        size = batch_size(batch)
        one, other = take(batch, [0]), take(batch, [min(1, size - 1)])
        two = take(batch, [0, min(1, size - 1)])
        got, expected = (SinkByParameter(2, _PROOF, self._space, self._device()) for _ in range(2))
        values = []
        for b, example in enumerate((one, other)):
            value, gradients = gradients_of_one(self._model, self._space, function, example, nullcontext)
            values.append(value)
            for name, gradient in gradients.items():
                expected.add(name, gradient.unsqueeze(0), b)
        try:
            hooks.find_shared(function, one, two)
            together = hooks.add_to(got, function, two, nullcontext)
        except RuntimeError as problem:
            self._give_up_hooks(str(problem).splitlines()[0])
            return
        wrong = got.differing(expected, _RELATIVE, _FLOOR)
        if not torch.allclose(together, torch.cat(values), rtol=_RELATIVE, atol=_FLOOR, equal_nan=True):
            wrong = ["(the values themselves: an example's value depends on the other examples of its batch)"]
        if wrong:
            self._give_up_hooks(
                f"rules and plain autograd disagree on {wrong[:10]}: used outside their module's forward?"
            )
        else:
            self._proven_for = size

    def _autocast(self) -> Autocast:
        return nullcontext if self._dtype is None else partial(torch.autocast, self._device().type, self._dtype)

    def _device(self) -> torch.device:
        return self._model.get_parameter(self._space.names[0]).device


def nonfinite_examples(rows: Tensor) -> list[int]:
    """Positions of the rows (B, k) that hold a NaN or an infinity.

    Example:
        >>> nonfinite_examples(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
        [1]
    """
    return [int(i) for i in torch.isfinite(rows).all(dim=1).logical_not().nonzero()[:, 0]]


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise GradientError(
                f"{type(module).__name__} {name!r} keeps no running statistics, so that examples depend on each other "
                "also in evaluation; set track_running_stats=True or use another normalisation"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

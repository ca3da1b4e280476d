"""Where the examples are in the passes of a live model: looked at before anything rests on it.

Autograd's graph follows examples from layer to layer (`layout.py`). What it can't follow, and what has no graph, is
seen by comparing the layers' outputs for a batch with those for its halves (`apart.py`): of the first, the 2nd, 3rd,
5th, 9th and so on in evaluation mode, and where the graph is lost, of every batch in training mode. That is done before
the pass itself, so that what the model keeps, or anybody's hooks, is the pass's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from source_proj._errors import GradientError, SourceProjError
from source_proj.gradients.apart import OUTPUT, Marks, Outputs, cannot_run, random_halves, require_same
from source_proj.gradients.bare_path import BARE
from source_proj.gradients.batches import Batch, map_tensors
from source_proj.gradients.beside import BesidePath, cannot_capture
from source_proj.gradients.hooks import Pass, expanded, tensors_of
from source_proj.gradients.layout import Call, Node, where_examples_are_lost
from source_proj.gradients.probing import called, part, probing
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import Unsuited, UsedElsewhere
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = ["FollowedPath"]

_ODD = (5, 7, 11, 13, 17, 19, 23, 29)  # numbers of examples of which one is no other dim of a batch


class FollowedPath(BesidePath):
    """A path whose passes somebody else makes.

    Args:
        placement: of the live model.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        super().__init__(placement, space)
        self._live: Live = {name: [p] for name, p in space.parameters(placement.model).items()}
        self._anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
        self._shared_known = False
        self._looked_ahead: set[bool] = set()  # whether of several examples
        self._looks, self._looked = False, 0  # whether passes are compared with those of their halves; how many were
        self._is_drawn = False  # whether outputs are random in evaluation mode, so that nothing can be compared
        self._seen: tuple[Outputs, Marks] | None = None  # of taps beside the layers, while outputs are compared

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, *, current: Pass
    ) -> Tensor | None:
        try:
            return super()._on_output(module, args, kwargs, output, current=current)
        except Unsuited as problem:
            raise GradientError(
                f"{problem}: leave it out by parameters=['!{self._names[module]}.*'], or build the bank after training"
            ) from problem

    def _tapped(self, name: str, output: Tensor, x: Tensor, *given: Any, **options: Any) -> Tensor:
        if self._seen is not None:
            return self._look_at(name, output)
        if name == BARE:
            self._refuse_recomputed([f"!{missing}" for missing in list(self._missing)[:10]])
        return super()._tapped(name, output, x, *given, **options)

    def _note(self, name: str, tapped: Tensor, *given: Any, **options: Any) -> Tensor:
        return super()._note(name, tapped, *given, **options) if self._seen is None else self._look_at(name, tapped)

    def _look_at(self, name: str, output: Tensor, place: int = 0) -> Tensor:
        assert self._seen is not None
        outputs, marks = self._seen
        outputs.append((name, output.detach().clone().transpose(0, place)))  # which may be written to behind the layer
        return marks.on(output, place)

    def _find_shared(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        """Learn which layers see no batch, from one example and two; leaves random states and buffers alone."""
        single, double = (part(args, kwargs, some, size) for some in ([0], [0, min(1, size - 1)]))
        with probing(self._model):
            try:
                self.find_shared(called, single, double, partial(self._same_of_odd, args, kwargs, size))
            except SourceProjError:
                raise
            except Exception as error:  # the model's own
                raise GradientError(
                    f"the model does not run one or two examples of a batch by themselves ({error!r}), and without "
                    "that nothing says which layers see the batch: build the bank after training, without capture="
                ) from error
        self._shared_known = True

    def _same_of_odd(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> bool:
        """Whether it holds for a number of examples that is no other dim's, with which outputs might broadcast."""
        if not self._shared:
            return True
        dims: set[int] = set()
        map_tensors((args, kwargs), lambda tensor: dims.update(tensor.shape) or tensor)  # type: ignore[func-returns-value]
        odd = next((number for number in _ODD if number not in dims), max(dims) + 1)
        return self._is_as_it_was(called, part(args, kwargs, [place % size for place in range(odd)], size), odd)

    def _look_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        """Before the first pass of one example or several, make one like it: what the model, or hooks, keep is its own.

        A parameter that is used outside of its layer is then followed by itself.

        Raises:
            GradientError: the outputs of some layer are others for half of the batch, in evaluation mode, or a
                parameter can't be followed.
        """
        current = Pass(size, self._anchor, _nowhere)
        try:
            if size > 1:
                self._compare(args, kwargs, size, training=False)
            self._calls = []
            with (
                probing(self._model, training=True),
                torch.enable_grad(),
                self._hooked(partial(self._on_output, current=current)),
                self._beside_layers(current),
            ):
                output = called(self._model, (args, kwargs))
            self._looks = self._is_lost(self._calls, output, size) or self._looks
        except UsedElsewhere as problem:
            self._calls = None
            if problem.name in self._missing:
                raise cannot_capture(self._missing, [problem.name], "what it is used in is not followed") from problem
            self._set_apart({**self._elsewhere, problem.name: str(problem)})
            self._find_shared(args, kwargs, size)
            self._look_ahead(args, kwargs, size)
        except SourceProjError:
            raise
        except Exception:  # the model's own; the pass itself has the word
            pass
        finally:
            self._calls = None
        self._looked_ahead.add(size > 1)

    def _is_lost(self, calls: list[tuple[tuple[object, ...], Call]], output: Any, size: int) -> bool:
        """Whether autograd's graph leaves it open where each example is, in some layer.

        Raises:
            UsedElsewhere: a parameter is used outside of its layer.
        """
        taps = [call for _, call in calls]
        there: set[Node] = {call.tap for call in taps}
        for head in _heads(output):
            if head.grad_fn is not None and head.dim() and len(head) and head.shape[0] % size == 0:
                order = self._graph(head.grad_fn, taps, self._live)
                if size == 1 or where_examples_are_lost(order, taps, head.grad_fn, size) is None:
                    there.difference_update(order)
            if not there:
                return False
        return True

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, *, training: bool) -> None:
        """Refuse examples that depend on each other.

        Args:
            args: of the pass.
            kwargs: likewise.
            size: number of examples.
            training: in training mode, where the graph leaves it open; then what can't be compared is refused, too.

        Raises:
            GradientError: the outputs of some layer, or the model's, are others for half of the batch.
        """
        self._looked += training
        halves = random_halves(size, self._looked)
        batches = [(args, kwargs), *(part(args, kwargs, half.tolist(), size) for half in halves)]
        examples = (torch.arange(size, device="cpu"), *halves)
        for plain in (False, True):
            try:
                whole, *parts = (
                    self._outputs(batch, len(some), Marks(some, size, plain=plain), training=training)
                    for batch, some in zip(batches, examples, strict=True)
                )
                break
            except SourceProjError:
                raise
            except Exception as error:  # the model's own, or what it has against marks
                if training and (plain or self._missing or self._shared):  # whose rows marks alone tell apart
                    raise cannot_run(error) from error
        else:
            return
        try:
            require_same(whole, parts, halves, strict=training)
        except GradientError:
            if training or not self._is_random(batches[0], size, whole):
                raise
            self._is_drawn = True
            warnings.warn(
                "the model's outputs are random in evaluation mode, so that those of a batch and of its halves can't "
                "be compared: which row is whose rests on autograd's graph alone",
                UserWarning,
                stacklevel=2,
            )

    def _is_random(self, batch: Batch, size: int, before: Outputs) -> bool:
        """Whether the same batch gives other outputs, for other random numbers."""
        examples = torch.arange(size, device="cpu")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            again = self._outputs(batch, size, Marks(examples, size), training=False)
        try:
            require_same(before, [again], [examples], strict=False)
        except GradientError:
            return True
        return False

    def _outputs(self, batch: Batch, size: int, marks: Marks, *, training: bool) -> Outputs:
        """Outputs of all layers that see the batch, by name, in the order of their calls, and the model's."""
        outputs: Outputs = []

        def seen(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if module in self._shared:  # in a pass of training, too, it lies before each example
                output = expanded(output, size)
            return self._look_at(self._names[module], output, int(module in self._second))

        taps = bool(self._opened or self._missing)
        current, self._seen = Pass(size, self._anchor, _nowhere), (outputs, marks)
        try:
            with (
                probing(self._model, training=training),
                self._hooked(seen),
                torch.enable_grad() if taps else nullcontext(),
                self._beside_layers(current),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # of a variance of one example, say
                output = called(self._model, batch)
        finally:
            self._seen = None
        return [*outputs, *((OUTPUT, h.detach()) for h in _heads(output) if h.is_floating_point() and h.dim())]


def _heads(output: Any) -> list[Tensor]:
    """Tensors of numbers in whatever a model returns."""
    try:
        return tensors_of(output)
    except TypeError:  # nothing that holds any
        return []


def _nowhere() -> GradientSink:
    raise AssertionError("no backward pass goes through a pass that was only looked at")

"""Where the examples are in the passes of a live model: looked at before anything rests on it.

Autograd's graph follows examples from layer to layer (`layout.py`). What it can't follow, and what has no graph, is
seen by comparing the layers' outputs for a batch with those for its halves (`apart.py`): of the first batch in
evaluation mode, and where the graph is lost, of every batch in training mode. That is done before the pass itself, so
that what the model keeps, or anybody's hooks, is the pass's own.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, SourceProjError
from source_proj.gradients.apart import OUTPUT, Outputs, cannot_run, random_halves, require_same
from source_proj.gradients.batches import Batch, map_tensors
from source_proj.gradients.hooks import HookPath, Pass, tensors_of
from source_proj.gradients.layout import Call, Node, where_examples_are_lost
from source_proj.gradients.probing import called, part, probing
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import UsedElsewhere
from source_proj.trajectory.placement import Placement

__all__ = ["FollowedPath"]

_ODD = (5, 7, 11, 13, 17, 19, 23, 29)  # numbers of examples of which one is no other dim of a batch


class FollowedPath(HookPath):
    """A path whose passes somebody else makes.

    Args:
        placement: of the live model.
        space: the attributed parameters, each in a module that a rule covers.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        super().__init__(placement, space, opens=False)
        self._live = {name: [p] for name, p in space.parameters(placement.model).items()}
        self._anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
        self._shared_known = self._looked_ahead = False
        self._looks, self._looked = False, 0  # whether passes are compared with those of their halves; how many were

    def _find_shared(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        """Learn which layers see no batch, from one example and two; leaves random states and buffers alone."""
        batches = [part(args, kwargs, some, size) for some in ([0], [0, min(1, size - 1)])]
        with probing(self._model):
            try:
                self.find_shared(called, *batches)
                same = self.shared_as_they_were(called, *batches) and self._same_of_odd(args, kwargs, size)
            except SourceProjError:
                if not self._shared:
                    raise
                same = False
            except Exception as error:  # the model's own
                if not self._shared:
                    raise GradientError(
                        f"the model does not run one or two examples of a batch by themselves ({error!r}), and without "
                        "that nothing says which layers see the batch: build the bank after training, without capture="
                    ) from error
                same = False  # of shapes that it did not make
        if not same:
            names = sorted(self._names[module] for module in self._shared)[:5]
            raise GradientError(
                f"the layers {names} see no batch, and what the model makes of their outputs can't be told apart by "
                f"examples: leave them out by parameters={[f'!{name}.*' for name in names]}, or build after training"
            )
        self._shared_known = True

    def _same_of_odd(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> bool:
        """Whether it holds for a number of examples that is no other dim's, with which outputs might broadcast."""
        if not self._shared:
            return True
        dims: set[int] = set()
        map_tensors((args, kwargs), lambda tensor: dims.update(tensor.shape) or tensor)  # type: ignore[func-returns-value]
        odd = next((number for number in _ODD if number not in dims), max(dims) + 1)
        return self._as_it_was(called, part(args, kwargs, [place % size for place in range(odd)], size), odd)

    def _look_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        """Before the first pass of several examples, make one like it: what the model, or hooks, keep is the pass's.

        Raises:
            GradientError: the outputs of some layer are others for half of the batch, in evaluation mode.
            Unsuited: a parameter is used outside of its layer.
        """
        self._compare(args, kwargs, size, training=False)
        self._calls = []
        current = Pass(size, self._anchor, _nowhere)
        try:
            with (
                probing(self._model, training=True),
                torch.enable_grad(),
                self._hooked(partial(self._on_output, current=current)),
            ):
                output = called(self._model, (args, kwargs))
            self._looks = self._is_lost(self._calls, output, size)
        except SourceProjError:
            raise
        except Exception:  # the model's own; the pass itself has the word
            self._looks = False
        finally:
            self._calls = None
        self._looked_ahead = True

    def _is_lost(self, calls: list[tuple[tuple[object, ...], Call]], output: Any, size: int) -> bool:
        """Whether autograd's graph leaves it open where each example is, in some layer.

        Raises:
            GradientError: a parameter is used outside of its layer.
        """
        taps = [call for _, call in calls]
        there: set[Node] = {call.tap for call in taps}
        for head in _heads(output):
            if head.grad_fn is not None and head.dim() and len(head) and head.shape[0] % size == 0:
                try:
                    order = self._graph(head.grad_fn, taps, self._live)
                except UsedElsewhere as error:
                    raise GradientError(
                        f"{error}: leave it out by parameters={[f'!{error.name}']}, or build the bank after training"
                    ) from error
                if where_examples_are_lost(order, taps, head.grad_fn, size) is None:
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
        try:
            whole, *parts = (self._outputs(each, training=training) for each in batches)
        except SourceProjError:
            raise
        except Exception as error:  # the model's own
            if training:
                raise cannot_run(error) from error
            return
        require_same(whole, parts, halves, strict=training)

    def _outputs(self, batch: Batch, *, training: bool) -> Outputs:
        """Outputs of all layers that see the batch, by name, in the order of their calls, and the model's."""
        outputs: Outputs = []

        def seen(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> None:
            if module not in self._shared:
                output = output.detach().clone()  # which may be written to behind the layer
                outputs.append((self._names[module], output.transpose(0, 1) if module in self._second else output))

        with probing(self._model, training=training), self._hooked(seen), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a variance of one example, say
            output = called(self._model, batch)
        return [*outputs, *((OUTPUT, h.detach()) for h in _heads(output) if h.is_floating_point() and h.dim())]


def _heads(output: Any) -> list[Tensor]:
    """Tensors of numbers in whatever a model returns."""
    try:
        return tensors_of(output)
    except TypeError:  # nothing that holds any
        return []


def _nowhere() -> GradientSink:
    raise AssertionError("no backward pass goes through a pass that was only looked at")

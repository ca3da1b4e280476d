"""The conventions of captum.influence, for code that is written to them: tensors in, tensors or places out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from source_proj.attribution.attributor import Attributor, Queries

__all__ = ["CaptumInfluence", "MostInfluential", "as_queries"]


class MostInfluential(NamedTuple):
    """The strongest training examples of each test example, as captum's ``KMostInfluentialResults``.

    Attributes:
        indices: places in the training set, ``(Q, k)`` int64.
        influence_scores: their influence, ``(Q, k)`` float32, strongest first.
    """

    indices: Tensor
    influence_scores: Tensor


class CaptumInfluence:
    """An attribution method that is called like captum's ``TracInCP`` and its other ``DataInfluence`` classes.

    captum's sign differs where less is better: there, positive influence improved the test example. With
    :class:`Regression`, whose measurement is an error, influence is therefore minus the score; with tasks whose
    measurement is better the higher it is, the score itself. The size stays in the measurement's unit.

    Args:
        attributor: :class:`Source` or another method, with the model if it shall be asked about data.

    Example:
        >>> import tempfile
        >>> import source_proj as sp
        >>> model = torch.nn.Linear(2, 3)
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Classification(), run, TensorDataset(x, y), f"{folder}/bank", progress=False)
        ...     influence = CaptumInfluence(sp.Source(bank, model=model))
        ...     scores, strongest = influence.influence((x[:2], y[:2])), influence.influence((x[:2], y[:2]), k=3)
        >>> scores.shape, strongest.indices.shape
        (torch.Size([2, 5]), torch.Size([2, 3]))
    """

    def __init__(self, attributor: Attributor) -> None:
        self.attributor = attributor

    def influence(self, inputs: Any, k: int | None = None, proponents: bool = True) -> Tensor | MostInfluential:
        """Return the influence of every training example on every test example, or the k strongest.

        Args:
            inputs: a batch of test examples, (input, target) or a dict with "labels"; or a data set or DataLoader.
            k: how many; None for the influence of all.
            proponents: those that helped most; False for those that harmed most.

        Returns:
            ``(Q, N)`` float32; with k, what :class:`MostInfluential` says.

        Raises:
            ValueError: entries of a batch have different numbers of examples; else as :meth:`Attributor.score`.
            TypeError: an entry of a batch makes no tensor.
        """
        queries, improves = as_queries(inputs), self.attributor.higher_is_better
        sign = 1 if improves else -1
        if k is None:
            return torch.from_numpy(np.asarray(self.attributor.score(queries).to_numpy(), np.float32)) * sign
        strongest = self.attributor.top_k if proponents == improves else self.attributor.bottom_k
        hits = strongest(queries, k)
        return MostInfluential(torch.from_numpy(hits.indices), torch.from_numpy(hits.scores) * sign)

    def self_influence(self) -> Tensor:
        """Return how much each training example lowered its own loss, ``(N,)`` float32.

        Raises:
            TypeError: the method has none.
        """
        own = getattr(self.attributor, "self_influence", None)
        if own is None:
            raise TypeError(f"{type(self.attributor).__name__} has no self-influence; use source_proj.Source")
        return torch.from_numpy(np.array(own(), dtype=np.float32))


class _Rows(Dataset[dict[str, Tensor]]):
    """A batch of keyword arguments, example by example."""

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch = dict(batch)

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


def as_queries(inputs: Any) -> Queries:
    """Take one batch apart into its examples; data sets and DataLoaders pass.

    Raises:
        ValueError: the batch is empty, or its entries have different numbers of examples.
        TypeError: an entry makes no tensor.
    """
    if isinstance(inputs, Mapping):
        batch = {str(name): as_tensor(values) for name, values in inputs.items()}
        _check_lengths(list(batch.values()))
        return _Rows(batch)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) and _is_batch(inputs):
        tensors = [as_tensor(values) for values in inputs]
        _check_lengths(tensors)
        return TensorDataset(*tensors)
    return inputs


def as_tensor(values: Any) -> Tensor:
    """A tensor stays on its device; anything else makes one on the CPU, whatever torch's default device is.

    Raises:
        TypeError: it is made of no numbers.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # of words, None, rows of several lengths
        raise TypeError(
            f"a batch of test examples has {values!r:.80} for inputs or targets, which makes no tensor ({error}): give "
            "(input, target) in tensors, the inputs alone, or a data set"
        ) from error


def _is_batch(inputs: Sequence[Any]) -> bool:
    """Whether it is (input, target) in tensors, and no list of examples."""
    return len(inputs) > 1 and isinstance(inputs[0], Tensor | np.ndarray)


def _check_lengths(tensors: Sequence[Tensor]) -> None:
    lengths = {len(values) if values.ndim else 0 for values in tensors}
    if len(lengths) != 1 or lengths == {0}:
        shapes = [tuple(values.shape) for values in tensors]
        raise ValueError(
            f"a batch of test examples has tensors of the shapes {shapes}; give (input, target) with as many targets "
            "as inputs"
        )

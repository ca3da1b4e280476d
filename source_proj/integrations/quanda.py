"""A wrapper that quanda's metrics and benchmarks take for one of its explainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.attribution.attributor import Attributor
from source_proj.integrations.captum import CaptumInfluence, as_tensor

__all__ = ["QuandaExplainer"]


class QuandaExplainer:
    """An attribution method as an explainer of quanda (https://github.com/dilyabareeva/quanda).

    quanda needs not be installed: what it asks of an explainer is here by name. Its metrics take explanations, its
    benchmarks make the explainer themselves, of a model and a training set of theirs:
    ``benchmark.evaluate(QuandaExplainer, expl_kwargs={"attributor": make})``.

    Args:
        model: the model that is explained, with its final weights.
        train_dataset: its training set.
        attributor: a method on a bank of that training set; or a function of ``(model, train_dataset, checkpoints)``
            that builds one, as benchmarks need it.
        task: "image_classification" or "text_classification", as quanda names them.
        checkpoints: paths that quanda hands on to the function; a bank that is there already knows its own.
        checkpoints_load_func: quanda passes it to every explainer; here the weights are read by :class:`Checkpoint`.

    Raises:
        MismatchError: the bank has another number of training examples.
        ValueError: the task is another.
    """

    accepted_tasks = ("image_classification", "text_classification")

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        attributor: Attributor | Callable[[nn.Module, Any, Any], Attributor],
        task: str = "image_classification",
        checkpoints: Any = None,
        checkpoints_load_func: Any = None,
    ) -> None:
        if task not in self.accepted_tasks:
            raise ValueError(f"task must be one of {self.accepted_tasks}, got {task!r}")
        del checkpoints_load_func
        self.model, self.train_dataset = model, train_dataset
        made = attributor if isinstance(attributor, Attributor) else attributor(model, train_dataset, checkpoints)
        if made.n_rows != len(train_dataset):
            raise MismatchError(
                f"the bank has {made.n_rows} training examples, and train_dataset {len(train_dataset)}; give the data "
                "set that the bank was built from"
            )
        self._influence = CaptumInfluence(made)

    def explain(self, test_data: Tensor | Mapping[str, Tensor], targets: Sequence[int] | Tensor) -> Tensor:
        """Return the influence of every training example on the targets' measurement of the test examples, ``(Q, N)``.

        Args:
            test_data: the model's inputs, first dimension Q; a dict of them where they are keyword arguments.
            targets: the classes that are asked about, Q of them.
        """
        labels = as_tensor(targets)
        batch = {**test_data, "labels": labels} if isinstance(test_data, Mapping) else (test_data, labels)
        return cast(Tensor, self._influence.influence(batch))

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Return how much each training example lowered its own loss, ``(N,)`` float32.

        Args:
            batch_size: quanda gives it; the bank has the rows already, so nothing is run in batches.
        """
        del batch_size
        return self._influence.self_influence()

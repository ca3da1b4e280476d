"""RepSim: cosine of hidden representations at the final checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError, SourceProjError
from source_proj._io.locks import ThreadLock
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.attributor import Attributor, Queries, Term
from source_proj.attribution.features import QueryFeatures, SketchedQueries
from source_proj.attribution.operands import Operand, RowsInMemory, unit_rows
from source_proj.attribution.queries import checked_query_ids, query_source
from source_proj.bank import Bank, StageBank
from source_proj.bank.build.batch_hash import batch_hash
from source_proj.bank.build.data import BatchSource, to_device
from source_proj.gradients import nonfinite_examples, private_copy, require_own_weights
from source_proj.task import Batch, Task
from source_proj.trajectory.placement import placement_of, unwrapped

__all__ = ["RepSim"]

Function = Callable[[nn.Module, Batch], Tensor]


class RepSim(Attributor):
    """Cosine of the last hidden representations, at the final weights.

        score(q, z) = cos(h(q), h(z)),    h: input of the model's last linear layer

    (Hanawa et al., "Evaluation of Similarity-based Explanations", https://arxiv.org/abs/2006.04528; a rival of SOURCE
    in https://arxiv.org/abs/2405.12186.) A similarity in [-1, 1]: it ranks examples, but is no change of the
    measurement, knows nothing of labels, and is not summed over subsets; ``helpful`` lists those that are most alike.
    Representations are no gradients, so that the training data are read again: once for each bank, on first use, and
    compared with those that the bank was built from. All N representations of a bank stay in memory.

    Args:
        bank: a finalized bank, or a list of banks (scores are averaged).
        model: a module of the architecture that was trained; weights come from the bank's final checkpoint.
        train_set: what the bank was built from, in the same order; {stage name: data set} for several stages.
            Examples that were appended come after the others.
        layer: name of the module whose input is the representation (where it is called several times, in the last
            call); default: the last ``nn.Linear`` that a forward pass calls. An input (batch, features) is taken as it
            is, so that a head that reads one position decides which. (batch, tokens, features) is averaged over tokens:
            those that the batch's ``attention_mask`` marks, if it has one, else all.
        task: needed for custom tasks only; says how the model is called.
        batch_size: queries per forward pass.
        device: where the model runs and products are computed.
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        MismatchError: the training data are not the bank's; also see :class:`Attributor`.
        ValueError: there is no such layer, no ``nn.Linear``, or its input is of no shape above.
        SourceProjError: a representation is not finite.

    Example:
        The representation of a linear model is its input.

        >>> import tempfile
        >>> import source_proj as sp
        >>> model = nn.Linear(2, 1)
        >>> train = torch.utils.data.TensorDataset(torch.tensor([[1.0, 1.0], [-2.0, 0.0]]), torch.zeros(2, 1))
        >>> query = torch.utils.data.TensorDataset(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Regression(), run, train, f"{folder}/bank")
        ...     sp.RepSim(bank, model=model, train_set=train).score(query).to_numpy().round(3)
        array([[ 0.707, -1.   ]], dtype=float32)
    """

    additive = False

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module,
        train_set: Any,
        layer: str | None = None,
        task: Task | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        progress: Progress = True,
    ) -> None:
        super().__init__(bank, model=model, task=task, batch_size=batch_size, device=device, progress=progress)
        self._module = model = unwrapped(model)
        self._reading = ThreadLock()  # of the training data: once for each bank, however many threads ask
        self._sources = _sources(self.banks[0], train_set)
        self._candidates = _candidates(model, layer)
        self._train: dict[str, Tensor] = {}

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return "cosine"

    @property
    def higher_is_better(self) -> bool:
        """True, whatever is measured: the helpful examples are those that are most alike."""
        return True

    @cached_property
    def layer(self) -> str:
        """Name of the module whose input is the representation."""
        if len(self._candidates) == 1:
            return self._candidates[0]
        source = self._sources[0]
        _, _, batch = next(source.load([(0, min(source.n, source.batch_size))]))
        model = self._at_the_end(self.banks[0])
        batch = to_device(batch, _device(model))
        require_own_weights(self.task.output, model, self._module, batch)
        return _last_input(model, self._candidates, self.task.output, batch)[0]

    def _at_the_end(self, bank: Bank) -> nn.Module:
        """A copy of the model with a bank's final weights.

        Raises:
            GradientError: the model cannot be copied.
        """
        placement = placement_of(self._module)
        if not placement.is_copied:
            raise GradientError(
                f"RepSim reads representations from a copy of the model, and it is {placement.kind}: give a whole model"
            )
        final = bank.final_checkpoint()
        bank.notes.require_base(self._module, [final], str(bank.path))
        model = private_copy(self._module, self.device)
        final.load_into(model)
        return model

    def _features(
        self, queries: Queries, ids: Sequence[Any] | None, span: tuple[int, int] | None, progress: Progress
    ) -> SketchedQueries:
        source = query_source(queries, self.batch_size, self.banks[0].notes.columns)
        query_ids = checked_query_ids(queries, ids, source.n)
        start, stop = span or (0, source.n)
        features = SketchedQueries()
        for bank in self.banks:
            model = self._at_the_end(bank)
            measure = self.task.measurement
            parts: list[Tensor] = []
            with progress_bar(progress, "queries", stop - start, "queries") as bar:
                for low, high, batch in source.load([(start, stop)]):
                    placed = to_device(batch, _device(model))
                    if not parts:
                        require_own_weights(measure, model, self._module, placed)
                    parts.append(self._represent(model, measure, placed, "queries", low))
                    bar.update(high - low)
            rows = {bank.final_checkpoint().hash(): torch.cat(parts)}
            features.append(QueryFeatures(rows, query_ids[start:stop], self._description))
        return features

    @property
    def _description(self) -> dict[str, Any]:
        return {"representation": self.layer}

    def _sketch_spec(self, bank: Bank) -> dict[str, Any]:  # noqa: ARG002 (of all banks the same)
        return self._description

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        rows = self._training_rows(bank)
        query = unit_rows(features.at(bank.final_checkpoint())).to(rows.device)
        return [Term(query, RowsInMemory([Operand(0, len(rows), rows)]))]

    def _training_rows(self, bank: Bank) -> Tensor:
        """Representations of all stages' examples, of length 1, ``(N, h)``."""
        with self._reading:
            if bank.fingerprint not in self._train:
                _require_sizes(bank, self._sources)  # rows may have been appended since
                model = self._at_the_end(bank)
                stages = zip(bank.stages, self._sources, strict=True)
                rows = torch.cat([self._stage_rows(model, stage, source) for stage, source in stages])
                self._train[bank.fingerprint] = unit_rows(rows).to(self.device or "cpu")
            return self._train[bank.fingerprint]

    def _stage_rows(self, model: nn.Module, stage: StageBank, source: BatchSource) -> Tensor:
        rows = []
        for part in stage.parts:
            # In the bank's own batches, whatever a DataLoader says, for their hashes to compare.
            source.batch_size = part.spec.batch_size
            for shard in range(part.spec.n_shards):
                first, last = (part.spec.start + end for end in part.spec.span(shard))
                hashes = []
                for start, _, batch in source.load([(first, last)]):
                    hashes.append(np.frombuffer(batch_hash(batch), np.uint8))
                    rows.append(
                        self._represent(model, self.task.output, to_device(batch, _device(model)), stage.name, start)
                    )
                part.check_data(shard, np.stack(hashes))
        return torch.cat(rows)

    def _represent(self, model: nn.Module, function: Function, batch: Batch, what: str, start: int) -> Tensor:
        """Representations ``(B, h)`` float32 on the CPU."""
        _, inputs = _last_input(model, [self.layer], function, batch)
        rows = _pooled(inputs, batch, self.layer)
        bad = nonfinite_examples(rows)
        if bad:
            raise SourceProjError(
                f"the representation of {what}, examples {[start + i for i in bad[:10]]}, is not finite: "
                "look at their inputs, or at the final weights"
            )
        return rows.cpu()


def _sources(bank: Bank, train_set: Any) -> list[BatchSource]:
    """The stages' data sets, their sizes compared with the bank's."""
    names = [stage.name for stage in bank.stages]
    given = dict(train_set) if isinstance(train_set, Mapping) else {names[0]: train_set}
    if set(given) != set(names):
        raise ValueError(
            f"the bank has the stages {names}: give train_set as {{stage name: data set}}, got "
            f"{list(given) if isinstance(train_set, Mapping) else type(train_set).__name__}"
        )
    sources = [BatchSource(given[name]) for name in names]
    _require_sizes(bank, sources)
    return sources


def _require_sizes(bank: Bank, sources: Sequence[BatchSource]) -> None:
    for stage, source in zip(bank.stages, sources, strict=True):
        if source.n != stage.n:
            raise MismatchError(
                f"train_set has {source.n} examples for stage {stage.name!r}, and the bank {bank.path} has {stage.n}; "
                "give the data that it was built from"
            )


def _device(model: nn.Module) -> torch.device:
    return placement_of(model).device


def _candidates(model: nn.Module, layer: str | None) -> list[str]:
    """The name of the layer, or of every linear one: the last that is called will be it."""
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"the model has no module {layer!r}; it has {[name for name in modules if name][:50]}")
    chosen = [layer] if layer is not None else [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    if not chosen:
        raise ValueError("the model has no nn.Linear: name the module whose input is the representation, layer=")
    return chosen


@torch.no_grad()
def _last_input(model: nn.Module, candidates: Sequence[str], function: Function, batch: Batch) -> tuple[str, Tensor]:
    """Run function(model, batch); return name and first input of the candidate that was called last."""
    calls: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs or not isinstance(inputs[0], Tensor):
                raise ValueError(f"layer {name!r} gets no tensor as its first argument; name another one as layer=")
            calls[:] = [(name, inputs[0].detach())]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in candidates]
    try:
        function(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"no forward pass calls any of {candidates[:10]}; name another module as layer=")
    return calls[0]


def _pooled(inputs: Tensor, batch: Batch, layer: str) -> Tensor:
    """(B, h), or (B, T, h) averaged over tokens, to (B, h) float32."""
    inputs = inputs.float()
    if inputs.ndim == 2:
        return inputs
    if inputs.ndim != 3:
        raise ValueError(
            f"the input of layer {layer!r} has shape {tuple(inputs.shape)}; RepSim needs (batch, features) or "
            "(batch, tokens, features): name another module as layer="
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return inputs.mean(1)
    if mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and the input of layer {layer!r} {tuple(inputs.shape)}: "
            "name a module that reads one position as layer="
        )
    weights = mask.to(inputs)[..., None]  # (B, T, 1)
    mean: Tensor = (inputs * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean

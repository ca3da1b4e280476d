"""SOURCE in the sketched space: fit once, then a query costs its own backward passes and a matrix product a segment.

For a query q and a training example z of a stage with N examples, with the segments l = 1 … L in order of training,

    τ(q, z) = Σ_l ∇m(q)ᵀ S_L ··· S_{l+1} r_l(z),     r_l(z) = (1/N) c_l(Ĥ_l) ḡ_l(z),

is the change of the measurement m(q) when z is removed (eq. 16 to 23 of Bae et al., "Training Data Attribution via
Approximate Unrolled Differentiation", https://arxiv.org/abs/2405.12186). Everything is linear in the query, so that the
k x k matrices go to the query, q_l = c_l(Ĥ_l) S_{l+1} ··· S_L q̂, and training gradients are multiplied as they lie in
the bank:

    score(q, z) = -τ(q, z) = -Σ_l (1/N) q_l · ḡ_l(z).

Where the optimizer divided its gradients by their size (Adam), all this can happen in the metric of its preconditioner
(``preconditioner=`` of the trajectory; by default a number stands for P, which makes Adam a kind of SGD):
g̃ = P_l^½ g for g, H̃_l = P_l^½ H_l P_l^½ for H_l, and a query is sketched in each segment's metric, û^(m) = R P_m^½ ∇m.
A segment l takes the query's sketch in its own metric to exp(-s (Ĥ_l + λ)) û^(l), and that in an earlier one's to

    exp(-s λ) (û^(m) + C_{l→m} h(Ĥ_l) û^(l)),
    h(σ) = (exp(-s σ) - 1)/σ,    C_{l→m} = (1/N) Σ_i (R P_m^½ a_i)(R P_l^½ a_i)ᵀ.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._io.executors import Executor
from source_proj._io.html import facts
from source_proj._io.printable import bytes_in_words
from source_proj._io.progress import Progress, progress_bar, shared_bar
from source_proj.attribution.arguments import checked_number
from source_proj.attribution.attributor import Queries, Term
from source_proj.attribution.columns import checked_blocks
from source_proj.attribution.curvature import Curvature, Damping, check_damping, default_curvature, require_curvature
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.hits import Shown
from source_proj.attribution.operands import checked_rows
from source_proj.attribution.parts import PartScores
from source_proj.attribution.population import Population, some_of
from source_proj.attribution.predicted_change import PredictedChange
from source_proj.attribution.queries import checked_query_ids
from source_proj.attribution.query_points import QueryGradient, check_query_gradient, query_points, takes_mean
from source_proj.attribution.scores import Scores
from source_proj.attribution.self_influence import SelfInfluence
from source_proj.attribution.source.diagnosing import Diagnosing
from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.memory import parse_memory
from source_proj.attribution.source.segment_parts import add_segment_parts
from source_proj.attribution.source.segments import Segment, StageSegments, stage_groups
from source_proj.bank import Bank
from source_proj.sketch import plain_modes
from source_proj.task import CausalLM, Task, TokenQueries
from source_proj.task.tokens import loss_weights
from source_proj.trajectory import Checkpoint

__all__ = ["Source"]


class Source(Diagnosing):
    """SOURCE, segmented stationary unrolling (https://arxiv.org/abs/2405.12186), on a bank of sketched gradients.

    Args:
        bank: a finalized bank, or a list of banks of several runs: final scores are averaged over the runs.
        model: a module of the architecture that was trained, for queries given as data.
        task: the task of the bank; needed for custom tasks only.
        segments: how checkpoints fall into segments: a number, explicit lists of checkpoint indices, or a mapping
            from stage names to either; default: as the trajectory had it.
        curvature: ``"empirical_fisher"``, ``"gauss_newton"`` or ``"sampled_fisher"``; default: Gauss-Newton for
            :class:`Regression`; the sampled Fisher for :class:`CausalLM` where the bank has its rows; else the
            empirical one.
        damping: added to the eigenvalues inside c: ``"noise"`` takes ρ = tr(Ĥ)/k, the sketch's own noise (0 for an
            exact sketch); a number is used as it is; None switches damping off.
        blocks: into how many sketches the bank's is cut, by its columns: the scores of B are averaged, and fits take
            k² N/B + k³/B² operations. Default: as few as have 4,096 columns at most, and one where the rows of each
            segment are ¾ k at most (examples/paper/LABORATORY.md, "Large sketches in blocks").
        query_gradient: where ∇m(q) is taken. ``"final"``: at the final weights, as the formula has it, one backward
            pass per query. ``"mean"``: the mean over the checkpoints of the last stage, a backward pass at each. What a
            single run's final weights say of a query is noisy; the mean is nearer to what retraining does on average,
            and predicts it far better (examples/paper/LABORATORY.md, e). Default: ``"mean"``, but ``"final"`` for an
            exact sketch, whose scores are the formula's to the letter.
        time_scale: factor on the time of every segment. 1 predicts what leaving out a few examples does. Retraining on
            a share of the examples for as many epochs takes that share of the steps: give the share to predict it
            (measured in examples/paper/LABORATORY.md; it matters where training has not converged).
        memory: bytes that fit and search may take beyond the model and their results, as a number or such as "4GB".
            Training rows stay in memory where they fit into half of it, and are read from the bank for every set of
            queries where they do not; what is scored is the same. Of many queries (k/2 or more) so do the matrices
            that they go through, where a quarter will do. Default: 2 GB, and what a fit at this k takes.
        batch_size: queries per backward pass.
        device: where products are computed and queries run.
        executor: computes what reads the whole bank, fit and verbs alike; see
            :class:`~source_proj.attribution.attributor.Attributor`. Its workers read rows from the bank for every set
            of queries.
        cache: keep Hessians' spectra or factors beside the bank (in the user's cache folder where it is read-only).
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        MismatchError, BankError, ValueError: see :class:`Attributor`; ValueError for segments
            that are no ordered partition of a stage's checkpoints, or curvature that the bank does not offer.

    Example:
        Least squares with one weight, at 0 after 10 steps of 0.1: H = 5, s = 1, g = (-2, 0), and ∇m = -2 for the first
        example's own squared error, so that its score is -(1/2)(-2)(-2) (1 - exp(-5)) / 5.

        >>> import tempfile
        >>> import source_proj as sp
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> train = torch.utils.data.TensorDataset(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> exact = {"sketch": sp.Sketch(1, "identity"), "storage": "float32"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Regression("squared"), run, train, f"{folder}/bank", **exact)
        ...     scores = sp.Source(bank, model=model, curvature="gauss_newton").score(train)
        >>> abs(scores[0, 0] - -2 * (1 - np.exp(-5)) / 5) < 1e-6
        np.True_
        >>> scores
        Scores(2 queries x 2 training examples; +: including the example raised the squared error)
    """

    takes_captured = True

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        segments: StageSegments | None = None,
        curvature: Curvature | None = None,
        damping: Damping = "noise",
        blocks: int | None = None,
        query_gradient: QueryGradient | None = None,
        time_scale: float = 1.0,
        memory: int | str | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        cache: bool = True,
        progress: Progress = True,
    ) -> None:
        super().__init__(
            bank, model=model, task=task, batch_size=batch_size, device=device, executor=executor, progress=progress
        )
        self._options: dict[str, Any] = {
            "model": model, "task": task, "segments": segments, "curvature": curvature, "damping": damping,
            "blocks": blocks, "query_gradient": query_gradient, "time_scale": time_scale, "memory": memory,
            "batch_size": batch_size, "device": device, "executor": executor, "cache": cache, "progress": progress,
        }  # fmt: skip
        check_damping(damping)
        check_query_gradient(query_gradient)
        self.time_scale = checked_number("time_scale", time_scale, above=0)
        self.memory = parse_memory(memory)
        self.query_gradient: QueryGradient | None = query_gradient
        self.curvature: Curvature = default_curvature(self.banks) if curvature is None else curvature
        require_curvature(self.banks, self.curvature)
        self.damping: Damping = damping
        self._blocks = checked_blocks(blocks, self.banks)
        self.cache = cache
        self._groups = [stage_groups(own, segments) for own in self.banks]
        self._fitted: dict[str, FittedSegments] = {}

    def __repr__(self) -> str:
        runs = "" if len(self.banks) == 1 else f"; {len(self.banks)} runs"
        held = self.executor is None and all(self._of(bank).nbytes() <= self._limit for bank in self.banks)
        where = "held in memory" if held else "read from the bank each time"
        kept = sum(bank.fits.nbytes() for bank in self.banks)
        sizes = f"{bytes_in_words(self.nbytes())} of rows, {where}; {bytes_in_words(kept)} of fits on disk"
        fitted = self._fitted.get(self.banks[0].fingerprint)
        if fitted is not None and fitted.is_fitted:
            sizes += fitted.described_dimension(fitted.segments[-1], "; ")
        return f"Source({self.n_rows} training examples{runs}; {sizes})"

    def _repr_html_(self) -> str:
        at = "mean over checkpoints" if takes_mean(self.banks[0], self.query_gradient) else "final weights"
        pairs: list[tuple[object, object]] = [
            ("bank", ", ".join(str(bank.path) for bank in self.banks)),
            ("training examples", self.n_rows),
            ("measurement", self.unit),
            ("curvature", self.curvature.replace("_", " ")),
            ("damping", self.damping),
            ("query gradient", at),
        ]
        fitted = self._fitted.get(self.banks[0].fingerprint)
        if fitted is not None and fitted.is_fitted:  # showing computes nothing
            pairs += [
                (
                    each.name,
                    f"time {each.time:.3g}, tr(H) {each.trace:.3g}, damping {each.damping:.3g}"
                    f"{fitted.described_dimension(each, ', ')}",
                )
                for each in fitted.segments
            ]
        return facts("Source", pairs)

    def replace(self, **options: Any) -> "Source":
        """The same method with other options, on the same banks and by the same model: ``source.replace(damping=0.1)``.

        What does not depend on them is shared: the banks' files and weights are not read anew, spectra are found in the
        bank's cache, and features that :meth:`sketch` returned serve both.

        Args:
            **options: those of :class:`Source` but the bank.

        Raises:
            TypeError: an option is unknown, or it is the bank.
        """
        if "bank" in options:
            raise TypeError("replace() keeps the banks: for another one make Source(bank, ...) anew")
        return Source(list(self.banks), **{**self._options, **options})

    # Fit -------------------------------------------------------------------------------------------------------

    @plain_modes()
    def fit(self) -> "Source":
        """Compute what scoring needs, or find it in the cache; scoring does so by itself on first use."""
        self._compare_banks()
        for bank in self.banks:
            reads = sum(stage.n * stage.n_checkpoints for stage in bank.stages)
            with shared_bar(self.progress, "fit", reads, "rows"):
                self._of(bank).prepare()
        return self

    def nbytes(self) -> int:
        """Bytes of the training rows that queries are multiplied with, of all banks together."""
        return sum(self._of(bank).nbytes() for bank in self.banks)

    @property
    @plain_modes()
    def segments(self) -> tuple[Segment, ...]:
        """The fitted segments of the (first) bank, in order of training."""
        return self._of(self.banks[0]).segments

    def _of(self, bank: Bank) -> FittedSegments:
        """The bank's fitted segments; anew where rows were appended to it."""
        fitted = FittedSegments(
            bank, self._groups[self.banks.index(bank)], curvature=self.curvature, damping=self.damping,
            blocks=self._blocks,
            time_scale=self.time_scale, device=self.device, cache=self.cache, executor=self.executor, limit=self._limit,
        )  # fmt: skip
        return self._fitted.setdefault(bank.fingerprint, fitted)  # of several threads' the first

    @property
    def _limit(self) -> int:
        """Bytes of a bank's rows that may be held; the other half is for blocks of rows and scores."""
        return self.memory // (2 * len(self.banks))

    # Verbs beside score, top_k and bottom_k ----------------------------------------------------------------------

    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        self.fit()
        fitted = self._of(bank)
        return [
            Term(query.mul_(-1 / segment.n), fitted.rows(segment))
            for segment, query in zip(fitted.segments, self._moved(fitted, features), strict=True)
        ]

    def _moved(self, fitted: FittedSegments, features: QueryFeatures) -> list[Tensor]:
        """Queries as the segments' training gradients meet them, each ``(Q, k)`` float32."""
        metrics = sorted({segment.metric for segment in fitted.segments})
        queries = {metric: self._query(fitted.bank, features, metric) for metric in metrics}
        return fitted.moved(queries, features.asked)

    def _query_points(self, bank: Bank) -> list[Checkpoint]:
        return query_points(bank, self.query_gradient)

    @plain_modes()
    def by_segment(self, queries: Queries, rows: Sequence[int] | None = None) -> PartScores:
        """Split each score into the parts of the segments.

        The part of segment l is ``-(1/N) (c_l S_{l+1} ··· S_L q̂) · ḡ_l(z)``.

        Args:
            queries: as for :meth:`score`.
            rows: positions of the training examples wanted, in any order; default: all.

        Raises:
            ValueError: the runs of an ensemble have different numbers of segments, or there is no such row.
        """
        features, train_ids = self.sketch(queries), self.banks[0].ids
        wanted, order = (None, None) if rows is None else checked_rows(rows, self.n_rows)
        shape = len(self.segments), len(features[0]), self.n_rows if wanted is None else len(wanted)
        values = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for bank, queried in zip(self.banks, features, strict=True):
            fitted = self._of(bank)
            add_segment_parts(values, fitted, self._moved(fitted, queried), len(self.banks), wanted)
        sizes = (population := self._population()).sizes
        own = np.stack([np.repeat(np.arange(len(sizes)) == segment.stage, sizes) for segment in self.segments])
        shown = self.shown(features)
        if rows is not None:
            values, own, train_ids = values[:, :, order], own[:, list(rows)], [train_ids[row] for row in rows]
            shown = replace(shown, train=None if shown.train is None else shown.train.at(rows))
            population = some_of(self, features, sizes, population.stages[list(rows)])
        return self._parts(values, self.segments, features[0], train_ids, own, shown, population)

    def _population(self) -> Population:
        return Population.of_sizes([stage.n for stage in self.banks[0].stages])

    def _parts(
        self,
        values: Tensor,
        parts: Sequence[Any],
        features: QueryFeatures,
        train_ids: Sequence[Any],
        present: np.ndarray,
        shown: Shown,
        population: Population,
    ) -> PartScores:
        return PartScores(
            values.numpy(), tuple(parts), features.ids, list(train_ids), self.unit, self.task.higher_is_better, present,
            shown, population,
        )  # fmt: skip

    @plain_modes()
    def by_token(self, queries: Queries, documents: Any, *, stage: int | str = 0, ids: Any = None) -> PartScores:
        """Split the scores of some training sequences over their tokens: which words of a document mattered.

        The loss of a sequence under :class:`CausalLM` is a sum (or mean) over its tokens, and scores are linear in its
        gradient: a token's part is the change that this token's own term of the loss made, and the parts of a sequence
        sum to its score, but for the rounding of banked rows. As the bank holds whole sequences, this takes a backward
        pass for every token of the documents at each checkpoint; it is meant for the few that matter.

        Args:
            queries: as for :meth:`score`.
            documents: map-style data set of some of the training sequences.
            stage: name or index of the stage that they were trained on in.
            ids: the documents' ids, a sequence; default: their places among these, and not in the training set.

        Returns:
            A part for each position of a token.

        Raises:
            TypeError: the task is no language modelling.
            ValueError: no model was given, there is no such stage, or rows are of whole segments.
        """
        task = cast(CausalLM, self.task)
        tokens = TokenQueries(documents, task)  # which refuses every other task
        stage = self.banks[0].stage_index(stage)
        if self.banks[0].captured:
            raise ValueError(
                "by_token splits gradients at checkpoints, and these rows are of whole segments of training: take a "
                "bank that was built of checkpoints"
            )
        if self.model is None:
            raise ValueError("tokens are differentiated anew, by the model itself: pass model= when constructing")
        features = self.sketch(queries)
        total = torch.zeros(len(features[0]), len(tokens), dtype=torch.float32, device="cpu")
        for bank, queried in zip(self.banks, features, strict=True):
            fitted = self._of(bank)
            for segment, query in zip(fitted.segments, self._moved(fitted, queried), strict=True):
                if segment.stage == stage:
                    rows = self._token_rows(bank, segment, tokens)
                    total.add_(query.cpu() @ rows.T, alpha=1 / (segment.n * len(self.banks)))
        total *= total.new_tensor(loss_weights(task.of_stage(stage), documents, tokens))
        length = 1 + max(position for _, position in tokens.positions)
        places, positions = (list(column) for column in zip(*tokens.positions, strict=True))
        values = total.new_zeros(length, len(features[0]), len(documents))
        values[positions, :, places] = total.T
        present = np.zeros((length, len(documents)), dtype=bool)
        present[positions, places] = True
        read = self.banks[0].examples
        shown = replace(self.shown(features), train=None if read is None else read.like(documents))
        population = some_of(self, features, self._population().sizes, np.full(len(documents), stage))
        names = checked_query_ids(documents, ids, len(documents))
        return self._parts(values, range(length), features[0], names, present, shown, population)

    def _token_rows(self, bank: Bank, segment: Segment, tokens: TokenQueries) -> Tensor:
        """Sketched gradients of the tokens' log-likelihoods, the mean over a segment's checkpoints ``(T, k)``."""
        points = [bank.checkpoint(segment.stage, c) for c in segment.checkpoints]
        features = self._sketch(bank, tokens, points, [segment.metric])
        digest = bank.metrics.hash(segment.metric)
        return torch.stack([features.at(point, digest) for point in points]).mean(0)

    @plain_modes()
    def self_influence(self) -> SelfInfluence:
        """Return how much each training example lowered its own training loss, with ids; an array of ``(N,)`` float32.

        It is the score of the measurement m = -(own training loss) of the example's own stage, in the loss's own unit;
        ∇m is taken as ``query_gradient`` says, the final weights being the stage's last checkpoint; of a stage with a
        metric for each segment, the last segment's checkpoints alone have rows in all of them, and the mean is theirs.
        Large values mark examples that the model would not fit without having seen them, mislabelled ones among them.
        Needs neither model nor data.
        """
        self.fit()
        total = torch.zeros(self.n_rows, dtype=torch.float32, device="cpu")
        fits = [(bank, self._of(bank)) for bank in self.banks]
        reads = sum(bank.stages[segment.stage].n for bank, own in fits for segment in own.segments)
        with progress_bar(self.progress, "self-influence", reads, "rows") as bar:
            for bank, own in fits:
                own.add_self_influence(total, mean=takes_mean(bank, self.query_gradient), runs=len(fits), bar=bar)
        return SelfInfluence(total.numpy(), self.banks[0].ids, shown=self.shown())

    def predict_removal(self, queries: Queries, subset: Any, *, renormalize: bool = False) -> PredictedChange:
        """Predict how queries' measurements change when a subset is left out: see :meth:`Scores.predict_removal`."""
        scores: Scores = self.score(queries)
        return scores.predict_removal(subset, renormalize=renormalize)

"""Study (m): damping chosen by what the bank itself holds, without retraining."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from _bench import Bench
from _study import Recipe, Response, Segment, plain, query_gradients, segments_of
from torch import Tensor

import source_proj as sp
from source_proj.attribution.operands import loss_gradients
from source_proj.attribution.spectral import response

__all__ = ["MULTIPLES", "agreement", "held_out_likelihood", "held_out_objective", "without_retraining"]

MULTIPLES = (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)  # of tr(Ĥ)/k
_BANDS = 24  # of eigenvalues, each with as many directions

Choice = tuple[str, list[np.ndarray]]


def without_retraining(bench: Bench) -> Iterator[Choice]:
    """(m) A damping from held-out rows, or from what agrees between checkpoints or sketches, against tr(Ĥ)/k."""
    yield "tr(H)/k", bench.scores(Recipe())
    for name, losses in [("likelihood", held_out_likelihood), ("quadratic objective", held_out_objective)]:
        yield f"held-out rows, {name}", _chosen(bench, name, losses)
    yield "two half-sketches, correlation of scores", _by_half_sketches(bench)
    for multiple in (0.0, 0.3, 1.0):
        shrunk = [
            bench.one(bank, Recipe(respond=_agreeing(bench, bank, multiple)))
            for bank in map(bench.bank, range(bench.runs))
        ]
        yield f"agreement of a run's halves, with {multiple:g} tr(H)/k", shrunk


def _chosen(bench: Bench, name: str, losses: Callable[[Tensor, Tensor], Tensor]) -> list[np.ndarray]:
    found = []
    for run in range(bench.runs):
        bank = bench.bank(run)
        segment = segments_of(bank, Recipe())[-1]
        query = query_gradients(bank, bench.features(bank), Recipe())
        multiple = MULTIPLES[int(losses(_rows(bank, segment), query).argmin())]
        print(f"{bench.problem.name}, run {run}: {name} chooses {multiple:g} tr(H)/k", flush=True)
        found.append(bench.one(bank, Recipe(respond=plain(multiple))))
    return found


def held_out_likelihood(rows: Tensor, query: Tensor) -> Tensor:  # noqa: ARG001
    """-log N(g; 0, Ĥ + ρ) of half of the examples' gradients, Ĥ that of the other half, for each of `MULTIPLES`.

    Args:
        rows: ``(C, N, k)``.
        query: of no account.
    """
    values, vectors, held, _ = _two_halves(rows)
    energy = ((held @ vectors) ** 2).mean(0)
    return torch.stack([(shifted.log() + energy / shifted).sum() for shifted in _shifted(values)])


def held_out_objective(rows: Tensor, query: Tensor) -> Tensor:
    """Σ_q xᵀH'x - 2 xᵀq at x = (Ĥ + ρ)⁻¹q, H' that of the held-out half: least where x is nearest to H'⁻¹q.

    Arguments as for `held_out_likelihood`; query ``(Q, k)``.
    """
    values, vectors, _, hessian = _two_halves(rows)
    inside, asked = vectors.T @ hessian @ vectors, query.double() @ vectors
    solutions = [asked / shifted for shifted in _shifted(values)]
    return torch.stack([((x @ inside) * x - 2 * x * asked).sum() for x in solutions])


def _shifted(values: Tensor) -> Iterator[Tensor]:
    for multiple in MULTIPLES:
        yield values + multiple * values.mean()


def _two_halves(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spectrum of one random half of the examples, and the other half's rows and Hessian, float64."""
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
    used, held = (rows[:, part].flatten(0, 1) for part in order.tensor_split(2))
    values, vectors = torch.linalg.eigh((used.T @ used).double() / len(used))
    return values.clamp(min=0), vectors, held.double(), (held.T @ held).double() / len(held)


def _rows(bank: sp.Bank, segment: Segment) -> Tensor:
    """Loss gradients of a segment's checkpoints, ``(C, N, k)``."""
    return torch.stack(
        [torch.cat([part.rows for part in loss_gradients(bank, segment.stage, c, None)]) for c in segment.checkpoints]
    )


def _by_half_sketches(bench: Bench) -> list[np.ndarray]:
    """The damping at which two sketches of half the dimension agree best, used with the whole one."""
    found = []
    for run in range(bench.runs):
        pair = [bench.bank(run, dim=bench.dim // 2, seed=seed + run) for seed in (10, 20)]
        agree = []
        for multiple in MULTIPLES:
            one, other = (bench.one(bank, Recipe(respond=plain(multiple))) for bank in pair)
            agree.append(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)]))
        multiple = MULTIPLES[int(np.argmax(agree))]
        print(f"{bench.problem.name}, run {run}: half-sketches choose {multiple:g} tr(H)/k", flush=True)
        found.append(bench.one(bench.bank(run), Recipe(respond=plain(multiple))))
    return found


def _agreeing(bench: Bench, bank: sp.Bank, multiple: float) -> Response:
    """The response times the shares of mean gradients that both halves of the run have, by eigenvalue: rows', queries'.

    Where truth and noise do not correlate, the best linear estimate of a coordinate is its mean times this share.
    """
    segment = segments_of(bank, Recipe())[-1]
    rows = _rows(bank, segment)
    values, vectors = torch.linalg.eigh(segment.spectrum.apply(lambda sigma: sigma).double())
    half = len(rows) // 2
    shares = agreement(rows[:half].mean(0) @ vectors.float(), rows[half:].mean(0) @ vectors.float())
    features = bench.features(bank)
    first, last = (query_gradients(bank, features, Recipe(checkpoints=part)) for part in _halves(segment.checkpoints))
    shares = shares * agreement(first @ vectors.float(), last @ vectors.float())
    edges = values.clamp(min=1e-12 * float(values.max())).log().numpy()

    def respond(time: float, decay: float, floor: float, _values: Tensor) -> Callable[[Tensor], Tensor]:
        plain_response = response(time, decay, multiple * floor)
        return partial(_shrunk, plain_response, edges, shares.numpy())

    return respond


def _halves(checkpoints: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    half = len(checkpoints) // 2
    return checkpoints[:half], checkpoints[half:]


def _shrunk(function: Callable[[Tensor], Tensor], at: np.ndarray, shares: np.ndarray, sigma: Tensor) -> Tensor:
    logs = sigma.clamp(min=float(np.exp(at[0]))).log().numpy()
    return function(sigma) * torch.from_numpy(np.interp(logs, at, shares))


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Share of signal in the mean of two noisy measurements ``(n, k)``, for each of k coordinates, float64.

    Correlations r over bands of neighbouring coordinates make 2r/(1 + r) (Spearman and Brown), 0 where r is negative.
    """
    shares = torch.empty(first.shape[1], dtype=torch.float64)
    for band in torch.arange(first.shape[1]).tensor_split(_BANDS):
        one, other = first[:, band].double(), second[:, band].double()
        size = (one.square().sum() * other.square().sum()).sqrt().clamp(min=1e-300)
        r = ((one * other).sum() / size).clamp(min=0)
        shares[band] = 2 * r / (1 + r)
    return shares

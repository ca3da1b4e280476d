"""Influence functions on the leading eigenvectors of the Hessian, found by Arnoldi iteration."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._io.executors import Executor
from source_proj._io.progress import Progress
from source_proj.attribution.curvature import Curvature, Damping, damping_value
from source_proj.attribution.fits import Fit, fitted_matrix
from source_proj.attribution.methods.influence import InfluenceFunction
from source_proj.attribution.query_points import QueryGradient
from source_proj.attribution.spectral import ridge_inverse
from source_proj.bank import Bank
from source_proj.task import Task

__all__ = ["ArnoldiInfluence"]

_SPARE = 32  # steps beside two for each eigenvector that is wanted: the last of a Krylov space are not exact yet
_BROKEN = 1e-8  # of a product's length: what is left of it when the Krylov space already holds it, to rounding


class ArnoldiInfluence(InfluenceFunction):
    """Arnoldi influence functions (Schioppa et al., "Scaling Up Influence Functions", arXiv 2112.03052).

        score(q, z) = -(1/N) ∇m(q)ᵀ V (Λ + λ + ρ)⁻¹ Vᵀ g(z)

    with the r leading eigenpairs Λ, V of the sketched Hessian Ĥ; what lies outside their span is dropped, where
    :class:`~source_proj.InfluenceFunction` divides it by λ + ρ. λ is the training run's weight decay, ρ damping. As Ĥ
    is symmetric, Arnoldi's iteration is that of Lanczos; it takes 2 r + 32 steps (at most k) of k² operations each, and
    each direction is made orthogonal to all earlier ones, so that r = k gives the influence function itself. Ĥ is
    computed once, as other methods' is, and its eigenpairs are kept beside the bank.

    Args:
        bank: a finalized bank, or a list of banks (scores are averaged).
        model: see :class:`~source_proj.attribution.attributor.Attributor`.
        task: likewise.
        rank: r, how many eigenpairs; all k where there are fewer.
        seed: of the iteration's first vector.
        average: as for :class:`~source_proj.InfluenceFunction`.
        curvature: as for :class:`~source_proj.Source`.
        damping: None (as in the paper), ``"noise"`` (ρ = tr(Ĥ)/k), or a number. Without damping and weight decay, the
            inverse leaves out eigenvalues that are 0 to rounding.
        query_gradient: as for :class:`~source_proj.InfluenceFunction`.
        batch_size: queries per backward pass.
        device: where products are computed and queries run.
        executor: computes what reads the whole bank; see :class:`~source_proj.attribution.attributor.Attributor`.
        cache: keep Ĥ and its eigenpairs beside the bank.
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        TypeError: if the rank or the seed is no integer.
        ValueError: if the rank is not positive or the seed is negative.

    Example:
        Two weights at 0; x = (1, 0) with y = 2 has g = (-4, 0), x = (0, 1) with y = 1 has g = (0, -2), so that the
        empirical Fisher is diag(16, 4)/2. Of rank 1 it is the first direction, which the second example has no part
        in; the first one's own squared error has the score -(1/2)(-4)(-4)/8.

        >>> import tempfile
        >>> import source_proj as sp
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> train = torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([[2.0], [1.0]]))
        >>> run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
        >>> exact = {"sketch": sp.Sketch(2, "identity"), "storage": "float32"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = sp.build(model, sp.Regression("squared"), run, train, f"{folder}/bank", **exact)
        ...     method = sp.ArnoldiInfluence(bank, model=model, rank=1, curvature="empirical_fisher")
        ...     scores = method.score(train).to_numpy()
        >>> abs(scores).round(4).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        rank: int = 100,
        seed: int = 0,
        average: bool = False,
        curvature: Curvature | None = None,
        damping: Damping = None,
        query_gradient: QueryGradient | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        cache: bool = True,
        progress: Progress = True,
    ) -> None:
        super().__init__(
            bank,
            model=model,
            task=task,
            average=average,
            curvature=curvature,
            damping=damping,
            query_gradient=query_gradient,
            batch_size=batch_size,
            device=device,
            executor=executor,
            cache=cache,
            progress=progress,
        )
        self.rank = _integer("rank", rank, least=1)
        self.seed = _integer("seed", seed, least=0)

    def _solved(self, fit: Fit, query: Tensor, decay: float) -> Tensor:
        dim, is_exact = fit.bank.sketch.dim, fit.bank.sketch.is_exact
        rank = min(self.rank, dim)

        def compute() -> dict[str, Tensor]:
            hessian = fitted_matrix(fit).double()
            values, vectors = leading_eigenpairs(hessian, rank, self.seed)
            return {"values": values, "vectors": vectors, "trace": hessian.trace()[None]}

        made = fit.get("arnoldi", compute, rank=rank, seed=self.seed)
        ridge = decay + damping_value(self.damping, float(made["trace"]), dim, is_exact=is_exact)
        inside = query.to(made["vectors"]) @ made["vectors"]  # (Q, r)
        return (inside * ridge_inverse(ridge, dim)(made["values"])) @ made["vectors"].T


def _integer(name: str, given: Any, *, least: int) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {given!r}") from None
    if isinstance(given, bool) or number < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {given!r}")
    return number


def leading_eigenpairs(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric, positive semi-definite matrix and their vectors, from a Krylov space.

    A pure function of its arguments. Where the space of one start vector is invariant (of a repeated eigenvalue it
    holds one vector), the iteration goes on from another random vector.

    Args:
        matrix: ``(k, k)`` float64.
        rank: r <= k.
        seed: of the start vector.

    Returns:
        Eigenvalues ``(r,)`` in rising order, and orthonormal vectors ``(k, r)``.

    Example:
        >>> values, vectors = leading_eigenpairs(torch.diag(torch.arange(4.0).double()), rank=2, seed=0)
        >>> [round(value, 4) for value in values.tolist()], vectors.shape
        ([2.0, 3.0], torch.Size([4, 2]))
    """
    dim = len(matrix)
    steps = min(dim, 2 * rank + _SPARE)
    generator = torch.Generator().manual_seed(seed)
    basis, images = matrix.new_zeros(dim, steps), matrix.new_zeros(dim, steps)
    direction = _random(matrix, generator)
    for step in range(steps):
        length, earlier = direction.norm(), basis[:, :step]
        direction = _orthogonal(direction, earlier)
        if direction.norm() <= _BROKEN * length:
            direction = _orthogonal(_random(matrix, generator), earlier)
        basis[:, step] = direction / direction.norm()
        images[:, step] = direction = matrix @ basis[:, step]
    inner = basis.T @ images
    values, rotation = torch.linalg.eigh((inner + inner.T) / 2)
    return values[-rank:].clamp(min=0), basis @ rotation[:, -rank:]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A normal vector ``(k,)``, drawn on the CPU: the same on every device."""
    return torch.randn(len(like), generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What is left of a vector without its part in a basis, taken off twice: once leaves rounding."""
    once = vector - basis @ (basis.T @ vector)
    return once - basis @ (basis.T @ once)

"""How noisy is each kind of sketch? The squared error of inner products, on gradients of several structures.

    python examples/speed/fidelity.py                         # a minute on one core
    python examples/speed/fidelity.py --dim 1024 --seeds 40

Each number is k times the mean squared error of sketched inner products of normalised gradients, over (1 + cosine^2):
1 for dense random signs on gradients without large entries, whatever their structure. It is measured over seeds, on
pairs of gradients of one matrix parameter (o, i):

* gaussian, one-hot, low-rank: what the names say; one rank-one product is the gradient of a layer of one step;
* diagonal: equal entries along the diagonal, as where a layer copies its input;
* rectified: products of output gradients with activations that are rectified, so that all share a mean;
* real: gradients of a two-layer network on scikit-learn's digits, each of its weights (the extra demo).

For two-sided (Kronecker) projections the theory has two more terms, which grow with the cosines of the activations and
of the output gradients: 1/k_o and 1/k_i in place of 1/k. The tensor sketch has them only where a side is longer than k,
as within a block of k no two rows, and no two columns, meet.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine

KINDS = ("sparse", "rademacher", "kronecker", "tensor")
ROWS, COLUMNS, EXAMPLES, STEPS = 96, 160, 12, 8


def products(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_t (x) right_t of (B, T, o) and (B, T, i), flattened."""
    return torch.einsum("bto,bti->boi", left, right).flatten(1)


def one_hot() -> Tensor:
    rows = torch.zeros(EXAMPLES, ROWS * COLUMNS)
    rows[torch.arange(EXAMPLES), torch.randint(0, ROWS * COLUMNS, (EXAMPLES,))] = 1
    return rows


def diagonal() -> Tensor:
    rows = torch.zeros(EXAMPLES, ROWS, COLUMNS)
    rows[:, torch.arange(ROWS), torch.arange(ROWS)] = torch.randn(EXAMPLES, ROWS).sign()
    return rows.flatten(1)


def real() -> list[Tensor]:
    """Per-example gradients of each weight after some training."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(200):
        some = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    space = ParameterSpace.from_model(model, ["*.weight"])
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"))
    _, rows = engine.sketch(sp.Classification().output, (x[:EXAMPLES], y[:EXAMPLES]))
    return list(rows.split([96 * 64, 10 * 96], dim=1))


def inputs() -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Gradients (B, o i) with their shape, by name."""
    torch.manual_seed(0)
    common = torch.randn(ROWS)
    made: dict[str, Callable[[], Tensor]] = {
        "gaussian": lambda: torch.randn(EXAMPLES, ROWS * COLUMNS),
        "one-hot": one_hot,
        "rank one": lambda: products(torch.randn(EXAMPLES, 1, ROWS), torch.randn(EXAMPLES, 1, COLUMNS)),
        "low-rank": lambda: products(torch.randn(EXAMPLES, STEPS, ROWS), torch.randn(EXAMPLES, STEPS, COLUMNS)),
        "diagonal": diagonal,
        "rectified": lambda: products(
            common + torch.randn(EXAMPLES, STEPS, ROWS), torch.relu(torch.randn(EXAMPLES, STEPS, COLUMNS))
        ),
    }
    found = {name: (rows(), (ROWS, COLUMNS)) for name, rows in made.items()}
    first, second = real()
    return {**found, "real, first weight": (first, (96, 64)), "real, second weight": (second, (10, 96))}


def excess(rows: Tensor, shape: tuple[int, int], kind: str, dim: int, seeds: int) -> float:
    """Mean of k (<Rx, Ry> - <x, y>)^2 / (1 + <x, y>^2) over all pairs, norms among them."""
    x = F.normalize(rows.double(), dim=1)
    exact = x @ x.T
    upper = torch.ones_like(exact, dtype=torch.bool).triu()
    errors = []
    for seed in range(seeds):
        y = sp.Sketch(dim, kind, seed=seed)(x.float(), 1000 * seed, shape).double()
        errors.append(((y @ y.T - exact).square() / (1 + exact.square()))[upper].mean())
    return float(dim * torch.stack(errors).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=60)
    a = parser.parse_args()
    table = Table(title=f"k times the squared error of inner products, k = {a.dim}, {a.seeds} seeds", box=None)
    table.add_column("gradients")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for name, (rows, shape) in inputs().items():
        table.add_row(name, *(f"{excess(rows, shape, kind, a.dim, a.seeds):.2f}" for kind in KINDS))
    Console().print(table)


if __name__ == "__main__":
    main()

"""How noisy is each kind of sketch? The squared error of inner products, on gradients of several structures.

    python examples/speed/fidelity.py                         # a minute on one core
    python examples/speed/fidelity.py --dim 1024 --seeds 40

Each number is k times the mean squared error of sketched inner products of normalised gradients, over (1 + cosine^2):
1 for dense random signs on gradients without large entries, whatever their structure. It is measured over seeds, on
pairs of gradients of one matrix parameter (o, i):

* gaussian, one-hot, low-rank: what the names say; one rank-one product is the gradient of a layer of one step;
* diagonal: equal entries along the diagonal, as where a layer copies its input;
* rectified: products of output gradients with activations that are rectified, so that all share a mean;
* long: a side of 1,000 entries, so of several blocks of k;
* real: gradients of a two-layer network on scikit-learn's digits, each of its weights (the extra demo).

The last columns are the theory of the tensor sketch, for gradients X and Y (o, i) in the same unit. Its error is a sum
over pairs of coordinates that meet: in rows and columns both different, as for any sparse map, 1/k at most; in one row,
whose columns meet only if they lie in different blocks of k, |X^T Y|^2 + tr (X^T Y)^2 over these; in one column
likewise, |X Y^T|^2 + tr (X Y^T)^2. The latter two grow with the cosines of output gradients and of activations, up to
the number of coordinates that share them, and are zero while no side is longer than k. For two-sided (Kronecker)
projections they are there always, over k_o and k_i in place of k.
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
LONG = (24, 1000)


def products(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_t (x) right_t of (B, T, o) and (B, T, i), flattened."""
    return torch.einsum("bto,bti->boi", left, right).flatten(1)


def one_hot(count: int) -> Tensor:
    rows = torch.zeros(EXAMPLES, count)
    rows[torch.arange(EXAMPLES), torch.randint(0, count, (EXAMPLES,))] = 1
    return rows


def factors(size: int) -> Tensor:
    return torch.randn(EXAMPLES, STEPS, size)


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
    common, short = torch.randn(ROWS), torch.randn(LONG[0])
    made: dict[str, Callable[[], Tensor]] = {
        "gaussian": lambda: torch.randn(EXAMPLES, ROWS * COLUMNS),
        "one-hot": lambda: one_hot(ROWS * COLUMNS),
        "rank one": lambda: products(factors(ROWS)[:, :1], factors(COLUMNS)[:, :1]),
        "low-rank": lambda: products(factors(ROWS), factors(COLUMNS)),
        "diagonal": diagonal,
        "rectified": lambda: products(common + factors(ROWS), torch.relu(factors(COLUMNS))),
    }
    long: dict[str, Callable[[], Tensor]] = {
        "one-hot, long": lambda: one_hot(LONG[0] * LONG[1]),
        "low-rank, long": lambda: products(factors(LONG[0]), factors(LONG[1])),
        "rectified, long": lambda: products(short + factors(LONG[0]), torch.relu(factors(LONG[1]))),
    }
    found = {name: (rows(), (ROWS, COLUMNS)) for name, rows in made.items()}
    found |= {name: (rows(), LONG) for name, rows in long.items()}
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


def theory(rows: Tensor, shape: tuple[int, int], dim: int) -> tuple[float, float, float]:
    """The tensor sketch's three terms: coordinates that differ in row and column, in one row, in one column."""
    x = F.normalize(rows.double(), dim=1).view(-1, *shape)
    terms = []
    for a in range(len(x)):
        for b in range(a, len(x)):
            both = x[a] * x[b]
            squares = [x[a].square(), x[b].square()]

            def together(axes: list[int], both: Tensor = both, squares: list[Tensor] = squares) -> Tensor:
                first, second, product = (t.sum(axes) if axes else t for t in (*squares, both))
                return (first * second + product.square()).sum()

            apart = together([0, 1]) - together([1]) - together([0]) + together([])
            in_row, in_column = (_across(p, dim) for p in (x[a].T @ x[b], x[a] @ x[b].T))
            terms.append(torch.stack([apart, in_row, in_column]) / (1 + both.sum().square()))
    coordinates, in_row, in_column = torch.stack(terms).mean(0).tolist()
    return coordinates, in_row, in_column


def _across(products: Tensor, dim: int) -> Tensor:
    """Sum of P_ij^2 + P_ij P_ji over i and j in different blocks."""
    block = torch.arange(len(products)) // dim
    return ((products.square() + products * products.T) * (block[:, None] != block)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=60)
    a = parser.parse_args()
    table = Table(title=f"k times the squared error of inner products, k = {a.dim}, {a.seeds} seeds", box=None)
    table.add_column("gradients")
    for column in (*KINDS, "theory", "apart", "in a row", "in a column"):
        table.add_column(column, justify="right")
    for name, (rows, shape) in inputs().items():
        measured = [excess(rows, shape, kind, a.dim, a.seeds) for kind in KINDS]
        terms = theory(rows, shape, a.dim)
        table.add_row(name, *(f"{value:.2f}" for value in (*measured, sum(terms), *terms)))
    Console().print(table)


if __name__ == "__main__":
    main()

"""AdamW: which metric predicts retraining best, on Fashion-MNIST with an MLP (784-64-32-10).

    python examples/paper/adam_metrics.py            # converged: 2,000 images, 20 epochs
    python examples/paper/adam_metrics.py --noisy    # 30 % wrong labels, 4 epochs

The linear datamodeling score against models retrained with AdamW on random halves, for every metric of a trajectory,
one segment or three, and the time of the whole set or of a half. Scores are of single runs, their LDS averaged.

60 halves, 3 retrainings each, 3 runs, k = 1,024, the mean query gradient; the time of the whole set, or that of a half:

    metric         segments    converged       noisy
    none           1           .337    .293    .426    .402
    scalar         1           .466    .463    .626    .622
    shared         1           .526    .526    .599    .611
    none           3           .310    .271    .426    .403
    scalar         3           .464    .455    .606    .614
    shared         3           .499    .507    .555    .589
    per_segment    3           .481    .494    .555    .589

At k = 4,096 (one run, noisy): scalar .640 and .636, shared .615 and .638. Hence "shared" is the default.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import _above  # noqa: F401
import numpy as np
import torch
from _images import draw, replace_labels
from _stacked import margin, mlp
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.data import TensorDataset

import source_proj as sp

LR, DECAY, BATCH, CHECKPOINTS = 1e-3, 1e-2, 64, 6
Make = Callable[[], nn.Module]


def train(
    make: Make, data: TensorDataset, kept: list[np.ndarray], seeds: list[int], epochs: int
) -> tuple[dict[str, Tensor], list[list[sp.Checkpoint]]]:
    """Train models in lock-step: AdamW acts on each number alone, so stacked parameters are many models.

    Returns:
        Stacked final parameters, and the checkpoints of each model.
    """
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(make())
    parameters, _ = stack_module_state(models)
    parameters = {name: nn.Parameter(p.detach()) for name, p in parameters.items()}
    base = make()
    inputs, targets = data.tensors

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(base, p, (x,)), y)

    gradients = vmap(grad(loss))
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=DECAY)
    rngs = [np.random.default_rng(seed) for seed in seeds]
    steps = epochs * -(-len(kept[0]) // BATCH)
    at = {round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    found: list[list[sp.Checkpoint]] = [[] for _ in seeds]
    step = 0
    for _ in range(epochs):
        orders = [rng.permutation(one) for rng, one in zip(rngs, kept, strict=True)]
        for start in range(0, len(kept[0]), BATCH):
            index = torch.from_numpy(np.stack([order[start : start + BATCH] for order in orders]))
            detached = {name: p.detach() for name, p in parameters.items()}
            for name, gradient in gradients(detached, inputs[index], targets[index]).items():
                parameters[name].grad = gradient
            optimizer.step()
            step += 1
            if step in at and len(seeds) < 10:
                for m in range(len(seeds)):
                    found[m].append(_checkpoint(parameters, optimizer, m, step))
    return {name: p.detach() for name, p in parameters.items()}, found


def _checkpoint(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, m: int, step: int) -> sp.Checkpoint:
    state = {
        name: {"step": step, "exp_avg_sq": optimizer.state[p]["exp_avg_sq"][m].clone()}
        for name, p in parameters.items()
    }
    weights = {name: p.detach()[m].clone() for name, p in parameters.items()}
    return sp.Checkpoint(weights, step, LR, {"state": state, "param_groups": []})


def outcomes(make: Make, data: TensorDataset, masks: np.ndarray, retrainings: int, queries: TensorDataset, epochs: int):
    """Mean margins ``(S, Q)`` of models retrained on subsets."""
    pairs = [(np.flatnonzero(mask), 100 * s + r) for s, mask in enumerate(masks) for r in range(retrainings)]
    base, found = make(), []
    for start in range(0, len(pairs), 20):
        some = pairs[start : start + 20]
        state, _ = train(make, data, [kept for kept, _ in some], [seed for _, seed in some], epochs)
        outputs = vmap(lambda p: functional_call(base, p, (queries.tensors[0],)))(state)
        found.append(margin(outputs, queries.tensors[1]))
    return torch.cat(found).double().numpy().reshape(len(masks), retrainings, -1).mean(1)


def lds(scores: np.ndarray, masks: np.ndarray, truth: np.ndarray) -> float:
    """Mean over queries of the rank correlation of predicted and retrained margins."""
    predicted = masks.astype(float) @ scores.T
    return float(np.mean([spearmanr(predicted[:, q], truth[:, q]).statistic for q in range(truth.shape[1])]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of fashion_mnist")
    parser.add_argument("--noisy", action="store_true")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--metrics", nargs="+", default=["none", "scalar", "shared", "per_segment"])
    parser.add_argument("--segments", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=60)
    options = parser.parse_args()
    data, queries = draw(options, "fashion_mnist", 2000, 100)
    epochs = 4 if options.noisy else 20
    if options.noisy:
        data, _ = replace_labels(data, 0.3)
    make = mlp(784, 64, 32, 10)
    rng = np.random.default_rng(5)
    masks = np.zeros((options.subsets, len(data)), bool)
    for mask in masks:
        mask[rng.permutation(len(data))[: len(data) // 2]] = True
    truth = outcomes(make, data, masks, 3, queries, epochs)
    everything = [np.arange(len(data))] * options.runs
    _, runs = train(make, data, everything, [10**8 + r for r in range(options.runs)], epochs)
    model = make()
    with tempfile.TemporaryDirectory() as folder:
        for metric, segments in itertools.product(options.metrics, options.segments):
            if metric == "per_segment" and segments == 1:
                continue
            found: dict[tuple[float, str], list[float]] = {}
            for r, checkpoints in enumerate(runs):
                adam = sp.Adam(weight_decay=DECAY)
                course = sp.Trajectory(checkpoints, adam, segments=segments, metric=metric)
                path = Path(folder) / f"{metric}-{segments}-{r}"
                bank = sp.build(
                    model,
                    sp.Classification(),
                    course,
                    data,
                    path,
                    sketch=sp.Sketch(options.dim, seed=r),
                    progress=False,
                )
                features = None
                for gradient, scale in itertools.product(("mean", "final"), (1.0, 0.5)):
                    source = sp.Source(
                        bank, model=model, time_scale=scale, query_gradient=gradient, progress=False, cache=True
                    )
                    if features is None:
                        features = source.sketch(queries)
                    scores = np.asarray(source.score(features))
                    found.setdefault((scale, gradient), []).append(lds(scores, masks, truth))
            text = "  ".join(f"{g} x{s:g}: {np.mean(v):.3f}" for (s, g), v in found.items())
            print(f"{metric:>12} {segments} segments   {text}", flush=True)


if __name__ == "__main__":
    main()

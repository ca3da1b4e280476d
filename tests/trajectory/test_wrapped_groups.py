"""What a run says of parameters by name holds for the model that is given, whichever of the two was wrapped."""

import numpy as np
import pytest
import torch
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.trajectory import trained_parameters


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def compiled_in_part():
    model = network()
    model[2] = torch.compile(model[2], backend="eager")
    return model


class Holder(nn.Module):
    """As a LightningModule holds a network."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)


WRAPPERS = {
    "parallel": lambda: nn.DataParallel(network()),
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "compiled in part": compiled_in_part,
    "held": Holder,
}


def grouped(model, seed):
    """AdamW in three groups, drawn at random, of which one may stay as it is."""
    rng, named = np.random.default_rng(seed), list(model.named_parameters())
    members = rng.permutation(np.arange(len(named)) % 3)
    rates, decays = [0.02, 0.05, float(rng.choice([0.0, 0.01]))], [0.1, 0.0, 0.3]
    groups = [
        {
            "params": [pair for pair, own in zip(named, members, strict=True) if own == g],
            "lr": rate,
            "weight_decay": decay,
        }
        for g, (rate, decay) in enumerate(zip(rates, decays, strict=True))
    ]
    return torch.optim.AdamW(groups)


def train(model, seed, folder):
    optimizer, x = grouped(model, seed), torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    recorder = sp.Recorder(model, optimizer, folder / "recorded", every=3)
    for step in range(1, 7):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        recorder.step()
        if step % 3 == 0:
            content = {
                "global_step": step, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [],
            }  # fmt: skip
            torch.save(content, folder / f"step={step}.ckpt")
    return recorder


def facts(trajectory, model):
    """What the run's metrics are made of, and which parameters it trained, by their places."""
    names = [name for name, _ in model.named_parameters()]
    space = ParameterSpace.of_names(model, names)
    resolved = trajectory.resolve(model, space)
    stage = resolved.record.stages[0]
    scales = [resolved.scales[digest].diagonal for digest in resolved.record.metrics if digest is not None]
    trained, _ = trained_parameters(trajectory, model)
    return stage.scalars, stage.decays, scales, sorted(names.index(name) for name in trained)


def require_same(got, expected):
    for own, its in zip(got, expected, strict=True):
        if own is None or not len(own) or not isinstance(own[0], torch.Tensor):
            assert own == pytest.approx(its, rel=1e-6) if own is not None else its is None
        else:
            assert all(torch.equal(a, b) for a, b in zip(own, its, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preconditioner", ["scalar", "per_segment", "none"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_groups_and_trained_parameters_are_found_under_any_wrapper(tmp_path, wrapper, preconditioner, seed):
    (tmp_path / "plain").mkdir()
    (tmp_path / "wrapped").mkdir()
    plain = train(network(), seed, tmp_path / "plain").trajectory(preconditioner=preconditioner)
    recorded = train(WRAPPERS[wrapper](), seed, tmp_path / "wrapped").trajectory(preconditioner=preconditioner)
    expected = facts(plain, network())
    saved = sp.Trajectory.from_lightning(
        tmp_path / "wrapped", prefix="net." if wrapper == "held" else "", preconditioner=preconditioner
    )
    require_same(facts(recorded, network()), expected)
    if wrapper != "held":  # a state is not looked for within a module that holds its model
        require_same(facts(plain, WRAPPERS[wrapper]()), expected)
    require_same(
        facts(saved, network()),
        facts(sp.Trajectory.from_lightning(tmp_path / "plain", preconditioner=preconditioner), network()),
    )

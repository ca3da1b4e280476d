"""Lightning's checkpoints: those it writes, where it is installed, and files of the same form."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import source_proj as sp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def write(directory, steps=(4, 8, 12), rate=lambda t: 0.1, scheduled=False, prefix="", kind=torch.optim.AdamW, **extra):
    """A run by hand, saved as Lightning saves: its entries, its names."""
    model, data = network(), torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    optimizer = kind(model.parameters(), lr=rate(0), weight_decay=0.01)
    directory.mkdir(parents=True, exist_ok=True)
    for step in range(max(steps) + 1):
        optimizer.param_groups[0]["lr"] = rate(step)
        if step in steps:
            content = {
                "global_step": step,
                "state_dict": {prefix + name: value for name, value in model.state_dict().items()},
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [{"last_epoch": step}] if scheduled else [],
                **extra,
            }
            torch.save(content, directory / f"epoch=0-step={step}.ckpt")
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return model


def write_metrics(directory, rates, column="lr-AdamW"):
    lines = [f"epoch,loss,{column},step", *(f",,{rate!r},{step}" for step, rate in rates.items()), "0,0.5,,3"]
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")


def integrals_or_refusal(folder):
    try:
        return sp.Trajectory.from_lightning(folder, unpickle=True).stages[0].lr_integrals
    except ValueError:  # which says what to give
        return None


def falling(t):
    return 0.1 / (1 + t)


def test_a_constant_rate_is_in_the_optimizers_state(tmp_path):
    write(tmp_path / "version_0" / "checkpoints")
    torch.save(
        torch.load(tmp_path / "version_0/checkpoints/epoch=0-step=12.ckpt"), tmp_path / "version_0" / "last.ckpt"
    )
    stage = sp.Trajectory.from_lightning(tmp_path, segments=3).stages[0]
    assert [c.step for c in stage.checkpoints] == [4, 8, 12]
    assert stage.lr_integrals == pytest.approx([0.4, 0.8, 1.2], rel=1e-12)
    assert stage.optimizer == sp.Adam(weight_decay=0.01, decoupled=True)
    assert [c.step for c in sp.Trajectory.from_lightning(tmp_path, steps=[4, 8]).stages[0].checkpoints] == [4, 8]


def test_logged_rates_are_integrated(tmp_path):
    write(tmp_path, rate=falling, scheduled=True)
    write_metrics(tmp_path, {t: falling(t) for t in range(12)})
    stage = sp.Trajectory.from_lightning(tmp_path).stages[0]
    expected = [math.fsum(falling(t) for t in range(step)) for step in (4, 8, 12)]
    assert stage.lr_integrals == pytest.approx(expected, rel=1e-12)
    with pytest.raises(sp.MismatchError, match=r"gives 0.1 for update 1, and 0.05 was logged"):
        sp.Trajectory.from_lightning(tmp_path, schedule=lambda t: 0.1)


def test_rates_that_stay_are_filled_in_and_others_asked_for(tmp_path):
    def in_two(t):
        return 0.1 if t < 8 else 0.01

    write(tmp_path, rate=in_two, scheduled=True)
    with pytest.raises(ValueError, match=r"learning-rate scheduler, and there is no metrics.csv.* give schedule="):
        sp.Trajectory.from_lightning(tmp_path)
    write_metrics(tmp_path, {0: 0.1, 5: 0.1, 7: 0.1, 8: 0.01})
    stage = sp.Trajectory.from_lightning(tmp_path).stages[0]
    assert stage.lr_integrals == pytest.approx([0.4, 0.8, 0.84], rel=1e-12)
    write_metrics(tmp_path, {0: 0.1, 5: 0.1})
    with pytest.raises(ValueError, match=r"was 0.1 at update 5 and 0.01 at update 8, and none"):
        sp.Trajectory.from_lightning(tmp_path)
    assert sp.Trajectory.from_lightning(tmp_path, schedule=in_two).stages[0].lr_integrals == stage.lr_integrals


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 4),
        lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.1, 2, cycle_momentum=False),
        lambda optimizer: schedulers.SequentialLR(
            optimizer, [schedulers.ConstantLR(optimizer, 1.0, 1), schedulers.CosineAnnealingLR(optimizer, 2)], [4]
        ),
        lambda optimizer: schedulers.LinearLR(optimizer, 0.1, total_iters=3),
    ],
    ids=["restarts", "cycles", "cosine", "warm-up"],
)
def test_rates_are_those_of_the_optimizer_or_asked_for(tmp_path, make):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates, states = make(optimizer), [], []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        states.append((copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())))
        optimizer.step()
        scheduler.step()
    for every in (1, 2, 3, 4):  # checkpoints, and logged rates
        for first in (0, 1, 2, 4):
            folder = tmp_path / f"{every}-{first}"
            folder.mkdir()
            for step in range(every, 13, every):
                own, its = states[step]
                content = {"global_step": step, "state_dict": {"w": torch.zeros(1)}, "optimizer_states": [own]}
                torch.save({**content, "lr_schedulers": [its]}, folder / f"step={step}.ckpt")
            write_metrics(folder, {t: rates[t] for t in range(first, 12, every)})
            expected = [math.fsum(rates[:step]) for step in range(every, 13, every)]
            integrals = integrals_or_refusal(folder)
            assert integrals == pytest.approx(expected, rel=1e-9) if integrals else (every, first) != (1, 0)


def test_a_rate_that_came_back_holds_where_its_schedule_took_no_step(tmp_path):
    restarts = {"T_0": 2, "last_epoch": 1}  # by epochs, of 12 updates
    write(tmp_path, lr_schedulers=[restarts])
    write_metrics(tmp_path, dict.fromkeys((0, 3, 7, 11), 0.1))
    assert sp.Trajectory.from_lightning(tmp_path).stages[0].lr_integrals == pytest.approx([0.4, 0.8, 1.2], rel=1e-12)


def test_a_prefix_is_cut_off(tmp_path):
    write(tmp_path, prefix="model.")
    run = sp.Trajectory.from_lightning(tmp_path, prefix="model.")
    with run.final.applied_to(network()):
        pass
    with pytest.raises(ValueError, match=r"begins with prefix='net.'"):
        sp.Trajectory.from_lightning(tmp_path, prefix="net.")


def test_a_bank_from_second_moments_in_ckpt_files(tmp_path):
    """The preconditioner is that of the optimizer that was saved."""
    write(tmp_path / "run", steps=(4, 8))
    run = sp.Trajectory.from_lightning(tmp_path / "run")
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    bank = sp.build(network(), sp.Classification(), run, data, tmp_path / "bank", sketch=sp.Sketch(dim=32))
    assert sp.Source(bank, model=network()).score(data).shape == (6, 6)


class Foreign:
    """An object that torch does not unpickle by itself."""


def test_other_objects_are_read_only_if_asked_for(tmp_path):
    write(tmp_path, hyper_parameters={"config": Foreign()})
    with pytest.raises(sp.MismatchError, match="unpickle=True reads other objects too"):
        sp.Trajectory.from_lightning(tmp_path)
    run = sp.Trajectory.from_lightning(tmp_path, unpickle=True)
    with run.final.applied_to(network()):
        pass


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer_states": [{}, {}]}, ValueError, "states of 2 optimizers"),
        ({"optimizer_states": None}, sp.MismatchError, "save_weights_only=True leaves those out"),
    ],
)
def test_checkpoints_that_lack_something_are_refused(tmp_path, change, error, message):
    write(tmp_path, **change)
    with pytest.raises(error, match=message):
        sp.Trajectory.from_lightning(tmp_path)


def test_directories_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.ckpt file: give the folder that Lightning's are in"):
        sp.Trajectory.from_lightning(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'.*absent' does not exist: give the folder"):
        sp.Trajectory.from_lightning(tmp_path / "absent")
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"steps=\[5\]: .* global steps \[4, 8, 12\]"):
        sp.Trajectory.from_lightning(tmp_path, steps=[5])


@pytest.mark.parametrize("reader", [sp.Trajectory.from_lightning, sp.Trajectory.from_hf_trainer])
def test_the_folder_of_a_recorder_is_read_by_its_own_reader(tmp_path, reader):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path)
    optimizer.step()
    recorder.step()
    recorder.trajectory()
    with pytest.raises(
        FileNotFoundError, match=r"holds the run of a Recorder: read it by Trajectory\.from_recorder\('/"
    ):
        reader(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of its own many dependencies
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_lightning_itself(tmp_path, accumulation):
    try:
        import lightning
        from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
        from lightning.pytorch.loggers import CSVLogger
    except Exception as error:  # a torchvision of another build breaks it with whatever that raises
        pytest.skip(f"lightning cannot be imported: {type(error).__name__}: {error}")
    used = []

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(lambda made, *_: used.append(made.param_groups[0]["lr"]))
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.randint(2, (32,)))
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulation,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(every_n_train_steps=4, save_top_k=-1),
            LearningRateMonitor("step"),
        ],
    ).fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=4))
    stage = sp.Trajectory.from_lightning(tmp_path, prefix="net.").stages[0]
    steps = [c.step for c in stage.checkpoints]
    assert steps == list(range(4, 16 // accumulation + 1, 4))
    assert stage.lr_integrals == pytest.approx([math.fsum(used[:step]) for step in steps], rel=1e-12)


def cycled(directory, kind, steps=(4, 8, 12)):
    """A run under OneCycleLR saved as Lightning saves; its weight moves under a gradient of one."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=max(steps) + 1)
    rates, momenta = [], []
    directory.mkdir(parents=True, exist_ok=True)
    for step in range(max(steps) + 1):
        if step in steps:
            content = {
                "global_step": step,
                "state_dict": {name: value.clone() for name, value in model.state_dict().items()},
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [{"last_epoch": step}],
            }
            torch.save(content, directory / f"step={step}.ckpt")
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group.get("momentum", group.get("betas", [0.0])[0]))
        if step < max(steps):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            scheduler.step()
    return model, rates, momenta


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize("steps", [(4, 8, 12), (12,)])
def test_a_cycled_momentum_that_is_not_known_is_refused(tmp_path, steps):
    _, rates, _ = cycled(tmp_path, sgd, steps)
    unknown = rf"the momentum was not known at update 0 and 0\.\d+ at update {steps[0]}, .*: give momentum="
    with pytest.raises(ValueError, match=unknown):
        sp.Trajectory.from_lightning(tmp_path, schedule=rates[:12])
    with pytest.raises(ValueError, match=r"momentum has 3 entries for the 12 updates"):
        sp.Trajectory.from_lightning(tmp_path, schedule=rates[:12], momentum=[0.9] * 3)
    with pytest.raises(ValueError, match=unknown):  # also where the optimizer is named by hand
        sp.Trajectory.from_lightning(tmp_path, schedule=rates[:12], optimizer=sp.SGD(momentum=0.9))


def test_a_momentum_changed_by_hand_is_refused(tmp_path):
    write(tmp_path, kind=lambda p, **options: torch.optim.SGD(p, momentum=0.9, **options))
    file = tmp_path / "epoch=0-step=8.ckpt"
    content = torch.load(file)
    content["optimizer_states"][0]["param_groups"][0]["momentum"] = 0.5
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"momentum was 0\.9 at update 4 and 0\.5 at update 8"):
        sp.Trajectory.from_lightning(tmp_path)


@pytest.mark.parametrize("logged", [True, False])
def test_a_cycled_momentum_is_integrated_over_every_step(tmp_path, logged):
    model, rates, momenta = cycled(tmp_path, sgd, (200, 400))
    options = {}
    if logged:
        lines = ["lr-SGD,lr-SGD-momentum,lr-SGD-weight_decay,step"]
        lines += [f"{rate!r},{momenta[t]!r},0.0,{t}" for t, rate in enumerate(rates)]
        (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    else:
        options = {"schedule": rates[:400], "momentum": momenta[:400]}
    (whole,) = sp.Trajectory.from_lightning(tmp_path, **options).stages[0].describe().cut(1)
    assert whole.time == pytest.approx(
        math.fsum(r / (1 - m) for r, m in zip(rates[:400], momenta[:400], strict=True)), rel=1e-12
    )
    assert whole.time == pytest.approx(-model.weight.item(), rel=0.05)


def test_adams_first_decay_rate_may_cycle_and_nothing_else_may_change(tmp_path):
    _, rates, _ = cycled(tmp_path, torch.optim.AdamW)
    stage = sp.Trajectory.from_lightning(tmp_path, schedule=rates[:12]).stages[0]
    assert stage.time_factors is None
    _, rates, _ = cycled(tmp_path, torch.optim.NAdam)
    with pytest.raises(sp.MismatchError, match=r"betas=.* was"):
        sp.Trajectory.from_lightning(tmp_path, schedule=rates[:12])
    write(tmp_path / "other")
    file = tmp_path / "other/epoch=0-step=8.ckpt"
    content = torch.load(file)
    content["optimizer_states"][0]["param_groups"][0]["weight_decay"] = 0.5
    torch.save(content, file)
    with pytest.raises(sp.MismatchError, match=r"changed at step 8: weight_decay=0.5 was 0.01"):
        sp.Trajectory.from_lightning(tmp_path / "other")

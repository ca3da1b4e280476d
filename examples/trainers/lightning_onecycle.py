"""Train with Lightning, OneCycleLR and averaged weights, and hold a bank against Lightning's own numbers.

OneCycleLR moves the momentum too, and with it what a step is worth: every update is given its own. ``WeightAveraging``
puts an average into each checkpoint; the trained weights, whose gradients made the steps, lie beside it.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from _compare import Comparison, Watch, Watched, first_update, times
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp

BATCH, ACCUMULATED, EPOCHS, EXAMPLES = 4, 2, 3, 48
UPDATES = EPOCHS * EXAMPLES // BATCH // ACCUMULATED


class Classifier(lightning.LightningModule):
    """Two layers; trained by SGD with momentum, or by AdamW."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.kind = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:  # noqa: D102
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:  # noqa: D102
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.kind == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=UPDATES + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, module: Classifier, train_set: Watched, watch: Watch, logged: bool) -> None:
    monitor = [LearningRateMonitor("step", log_momentum=True)] if logged else []
    averaging = EMAWeightAveraging(decay=0.8)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1,
        accumulate_grad_batches=ACCUMULATED, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(every_n_train_steps=6, save_top_k=-1), averaging, *monitor],
    )  # fmt: skip
    with watch.over(module):
        trainer.fit(module, DataLoader(train_set, BATCH, shuffle=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--logged", action="store_true", help="with a LearningRateMonitor, which logs the momentum too")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 5, generator=generator)
    data = TensorDataset(inputs, inputs[:, :3].argmax(1))
    module, watch, train_set = Classifier(options.optimizer), Watch(), Watched(data)  # type: ignore[arg-type]
    begin = {name: value.clone() for name, value in module.net.state_dict().items()}
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        fit(run, module, train_set, watch, options.logged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are averages too, which are compared here
            trajectory = sp.Trajectory.from_lightning(run, prefix="net.")
        averaged = sp.Trajectory.from_lightning(run, prefix="net.", weights="averaged")
        stage, comparison = trajectory.stages[0], Comparison()
        steps = [checkpoint.step for checkpoint in stage.checkpoints]
        # One gradient moves the weights by η/(1 - β) in all; Adam's mean of gradients has weights that sum to one.
        shares = [1 / (1 - momentum) if options.optimizer == "sgd" else 1.0 for momentum in watch.momenta]
        moved = [rate * share for rate, share in zip(watch.rates, shares, strict=True)]
        comparison.add("times of the checkpoints", times(stage), [sum(moved[:step]) for step in steps])
        starts = range(0, BATCH * ACCUMULATED, BATCH)
        batches = [train_set.order[start : start + BATCH] for start in starts]
        gradient, losses = first_update(module.net.eval(), sp.Classification(), begin, batches, data)
        comparison.add("gradient of update 0", gradient, watch.gradients[0])
        comparison.add("losses of update 0", losses, watch.losses[0])
        # At its end Lightning puts the averages into the module.
        kept, own = averaged.final.load(), module.net.state_dict()
        comparison.add("averaged weights", *(torch.cat([s[n].flatten() for n in own]) for s in (kept, own)))
        comparison.finish()
        bank = sp.build(
            module.net, sp.Classification(), trajectory, data, Path(temporary) / "bank", sketch=sp.Sketch(64)
        )
        scores = sp.Source(bank, model=module.net).score([data[i] for i in range(3)])
        print(f"scores of {scores.shape[0]} queries against {scores.shape[1]} examples, run ends at {steps[-1]}")


if __name__ == "__main__":
    main()

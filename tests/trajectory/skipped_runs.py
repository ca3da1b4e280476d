"""Runs some of whose steps are skipped, as a GradScaler skips them, and the same runs without those steps."""

import random
from typing import NamedTuple

import pytest
import torch
from recorded_runs import on_one_thread
from torch import nn

from source_proj.trajectory import Recorder


def of_torch(name, **options):
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 0.1, **options})


def schedule_free(name, **options):
    def make(parameters):
        optimizer = getattr(pytest.importorskip("schedulefree"), name)(parameters, lr=0.1, **options)
        optimizer.train()
        return optimizer

    return make


def adafactor(parameters):
    transformers = pytest.importorskip("transformers")
    return transformers.Adafactor(parameters, lr=0.1, scale_parameter=False, relative_step=False, beta1=0.9)


ROWS = {
    "sgd": of_torch("SGD", momentum=0.9),
    "adam": of_torch("Adam"),
    "adamw": of_torch("AdamW", amsgrad=True),
    "nadam": of_torch("NAdam", weight_decay=0.1, decoupled_weight_decay=True),
    "radam": of_torch("RAdam", weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": of_torch("Adamax"),
    "rmsprop": of_torch("RMSprop", momentum=0.9, centered=True),
    "adagrad": of_torch("Adagrad", lr_decay=0.01),
    "adafactor": adafactor,
    "schedule-free sgd": schedule_free("SGDScheduleFree", warmup_steps=5, r=1.0),
    "schedule-free adamw": schedule_free("AdamWScheduleFree", warmup_steps=5, betas=(0.9, 0.95)),
}


class Step(NamedTuple):
    """A step: the rate of its schedule, and the number of its update among those that are made; None if skipped."""

    rate: float
    update: int | None


def random_steps(seed, count=30, skips=0.3, zeros=0.2):
    """A schedule that may begin with a warm-up from 0, with rates of 0 on the way that the optimizer counts."""
    draw, steps, made = random.Random(seed), [], 0
    warmup = draw.choice([0, 3])
    for number in range(count):
        rate = 0.0 if draw.random() < zeros else draw.uniform(0.001, 0.1)
        rate = rate if number >= warmup else 0.05 * number / warmup
        skipped = draw.random() < skips
        steps.append(Step(rate, None if skipped else made))
        made += not skipped
    return steps


def without_skips(steps):
    return [step for step in steps if step.update is not None]


def made_until(steps, count):
    return len(without_skips(steps[:count]))


def gradient_of(update, like):
    """Of many sizes, and that of the update's own number."""
    generator = torch.Generator().manual_seed(update)
    return torch.randn(like.shape, generator=generator) * (1.0 + like.detach().abs())


@on_one_thread
def record(row, directory, steps, gradient=gradient_of, before=(), stop=(), dtype=torch.float32, **options):
    """Record steps; ``before`` come first and are not recorded. The program ends at each of ``stop`` and goes on."""
    for end in [*stop, len(steps)]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(dtype)
        optimizer = ROWS[row](list(model.parameters()))
        take(before, model, optimizer, gradient)
        recorder = Recorder(model, optimizer, directory, **options)
        begin = recorder.restore()
        take(steps[begin:end], model, optimizer, gradient, recorder)
        if end in stop:
            recorder.close()
    return recorder, model


def take(steps, model, optimizer, gradient, recorder=None):
    for rate, update in steps:
        optimizer.param_groups[0]["lr"] = rate
        if update is not None:
            for parameter in model.parameters():
                parameter.grad = gradient(update, parameter)
            optimizer.step()
        if recorder is not None:
            recorder.step()

"""No optimizer's state or class passes for another one's."""

import pytest
import torch
from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory import Adam, Checkpoint, Optimizer, RMSprop, moments
from source_proj.trajectory.optimizers.describe import describe_live, describe_state, optimizer_of_trainer

# Options and entries as the libraries have them, where they come near to ones that are described.
FOREIGN = {
    "timm RAdamLegacy": ("lr betas eps weight_decay", "step exp_avg exp_avg_sq"),
    "timm NAdamLegacy": ("lr betas eps weight_decay schedule_decay", "step exp_avg exp_avg_sq m_schedule"),
    "timm AdamWLegacy": (
        "lr betas eps weight_decay amsgrad foreach maximize capturable caution corrected_weight_decay",
        "step exp_avg exp_avg_sq",
    ),
    "timm SGDW, before it had caution": (
        "lr momentum dampening weight_decay nesterov maximize foreach differentiable", "momentum_buffer"
    ),
    "timm LARS": (
        "lr momentum dampening weight_decay nesterov trust_coeff eps trust_clip always_adapt", "momentum_buffer"
    ),
    "timm RMSpropTF": (
        "lr alpha eps momentum centered weight_decay decoupled_decay lr_in_momentum", "step square_avg momentum_buffer"
    ),
    "LAMB": (
        "lr betas eps weight_decay bias_correction grad_averaging max_grad_norm trust_clip always_adapt step",
        "exp_avg exp_avg_sq",
    ),
    "Prodigy": ("lr betas beta3 eps weight_decay d d0 d_max d_numerator d_coef k", "step s p0 exp_avg exp_avg_sq"),
    "Lion": ("lr betas weight_decay", "exp_avg"),
    "schedule-free RAdam": (
        "lr betas eps r k silent_sgd_phase train_mode weight_sum lr_max scheduled_lr weight_lr_power weight_decay",
        "z exp_avg_sq",
    ),
    "torch Muon": ("lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn", "momentum_buffer"),
    "SOAP": ("lr betas shampoo_beta eps weight_decay precondition_frequency", "step exp_avg exp_avg_sq GG Q"),
    "8-bit AdamW": ("lr betas eps weight_decay alpha t_alpha t_beta3", "step state1 state2 qmap1 qmap2 absmax1"),
}  # fmt: skip


def state_of(options: str, entries: str) -> dict:
    group = {key: (0.9, 0.999) if key == "betas" else 0.0 for key in options.split()}
    entry = {key: torch.ones(2, 3) for key in entries.split()}
    return {"state": {0: entry}, "param_groups": [{**group, "params": [0]}]}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_states_are_refused(name):
    state = state_of(*FOREIGN[name])
    with pytest.raises(ValueError, match="not those of any that is described"):
        describe_state(state, name)
    checkpoint = Checkpoint({"weight": torch.ones(2, 3)}, 10, optimizer_state=state)
    for optimizer in (Adam(), RMSprop()):
        with pytest.raises(MismatchError, match="not those of any that is described"):
            list(moments(checkpoint, optimizer, nn.Linear(3, 2, bias=False)))


LIVE = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)


@pytest.mark.parametrize("name", LIVE)
def test_torch_states_are_their_own_class_or_refused(name):
    """The class and the state say the same; and no state is accepted by another class."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = getattr(torch.optim, name)(list(model.parameters()), lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = model(torch.ones(4, 3)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    described = None
    full_name = f"{type(optimizer).__module__}.{name}"
    if any(full_name in kind.classes for kind in Optimizer.known.values()):
        described = describe_live(optimizer, model)
        assert describe_state(optimizer.state_dict(), name) == described
    else:
        with pytest.raises(ValueError, match=f"got {full_name}"):
            describe_live(optimizer, model)
        with pytest.raises(ValueError, match="not those of any that is described"):
            describe_state(optimizer.state_dict(), name)
    checkpoint = Checkpoint(model.state_dict(), 1, optimizer_state=optimizer.state_dict())
    for kind in Optimizer.known.values():
        if kind.preconditioned and type(described) is not kind:
            with pytest.raises(MismatchError, match="optimizer_state is of"):
                list(moments(checkpoint, kind(), model))


def test_subclasses_are_refused():
    class Mine(torch.optim.AdamW):
        pass

    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"got .*Mine"):
        describe_live(Mine(model.parameters()), model)


def test_every_name_of_the_trainer_is_supported_or_refused():
    names = pytest.importorskip("transformers.training_args").OptimizerNames
    supported, refusals = {}, {}
    for name in (entry.value for entry in names):
        try:
            supported[name] = optimizer_of_trainer(name).__name__
        except ValueError as refusal:
            refusals[name] = str(refusal)
    assert all(f"optim='{name}' trains with" in said for name, said in refusals.items())
    assert supported == {
        "adamw_torch": "Adam",
        "adamw_torch_fused": "Adam",
        "adamw_torch_xla": "Adam",
        "adamw_torch_npu_fused": "Adam",
        "adafactor": "Adafactor",
        "sgd": "SGD",
        "rmsprop": "RMSprop",
        "adagrad": "Adagrad",
        "schedule_free_adamw": "ScheduleFreeAdamW",
        "schedule_free_sgd": "ScheduleFreeSGD",
    }

"""The parameters that training moved: what each source of that knowledge says, and that the scores are theirs."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.trajectory import trained_parameters
from source_proj.trajectory.moved import left_alone

HEAD = ["3.weight", "3.bias"]


def network(freeze=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in freeze)
    return model


NAMES = [name for name, _ in network().named_parameters()]
BATCH = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def steps(model, optimizer, count, recorder=None):
    for _ in range(count):
        optimizer.zero_grad()
        cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step()


def checkpoint(model, step, optimizer=None):
    state = None if optimizer is None else optimizer.state_dict()
    return sp.Checkpoint(model.state_dict(), step, lr=0.1, optimizer_state=state)


def recorded(directory, model, optimizer, every=3, count=6):
    recorder = sp.Recorder(model, optimizer, directory, every=every)
    steps(model, optimizer, count, recorder)
    return sp.Trajectory.from_recorder(directory)


@pytest.mark.parametrize("every", [3, 6])  # two checkpoints, or one
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("given", ["all", "those that require a gradient", "the head's"])
def test_a_recorder_knows_what_was_trained(tmp_path, every, kind, given):
    """Also where frozen parameters are given to the optimizer; batch normalisation's buffers move and are no matter."""
    model = network(freeze=() if given == "the head's" else ("0", "1"))
    parameters = {
        "all": list(model.parameters()),
        "those that require a gradient": [p for p in model.parameters() if p.requires_grad],
        "the head's": list(model[3].parameters()),
    }[given]
    run = recorded(tmp_path, model, kind(parameters, lr=0.1), every)
    names, why = trained_parameters(run, network())
    assert names == HEAD
    assert "that the optimizer held" in why


def test_a_parameter_that_is_unfrozen_later_was_trained(tmp_path):
    model = network(freeze=("0", "1"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(model, optimizer, tmp_path, at=[2, 4])
    steps(model, optimizer, 2, recorder)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"\['0.bias', '0.weight'\] \(2\) were unfrozen .*step 4: .*another Recorder"):
        steps(model, optimizer, 2, recorder)
    model[3].requires_grad_(False)
    model[1].requires_grad_(True)
    steps(model, optimizer, 1, recorder)
    with pytest.warns(UserWarning, match=r"'3.weight'\] \(2\) were frozen and \['1.bias', '1.weight'\] .* unfrozen"):
        recorder.trajectory()
    model[3].requires_grad_(True)
    names, _ = trained_parameters(recorder.trajectory(), network())
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", *HEAD]


@pytest.mark.parametrize("every", [3, 6])
def test_groups_without_a_learning_rate_are_not_trained(tmp_path, every):
    model = network()
    groups = [{"params": model[3].parameters()}, {"params": [*model[0].parameters(), *model[1].parameters()], "lr": 0}]
    run = recorded(tmp_path, model, torch.optim.AdamW(groups, lr=0.1), every)
    assert trained_parameters(run, network())[0] == HEAD


def test_parameters_that_could_have_moved_and_did_not(tmp_path):
    """A layer that the loss never reaches is held by the optimizer and equal at all checkpoints."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    run = recorded(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert trained_parameters(run, Idle())[0] == ["used.weight", "used.bias"]


def test_without_a_recorder_checkpoints_are_compared():
    model = network(freeze=("0", "1"))
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    first = checkpoint(model, 0)
    steps(model, optimizer, 2)
    run = sp.Trajectory([first, checkpoint(model, 2)])
    assert trained_parameters(run, network()) == (HEAD, "those that differ between checkpoints")
    # Of one moment, and of weights that are the same at all, nothing can be compared.
    for same in ([checkpoint(model, 2)], [checkpoint(model, 1), checkpoint(model, 2)]):
        assert trained_parameters(sp.Trajectory(same), network(("0",)))[0] == NAMES[2:]
    assert trained_parameters(sp.Trajectory([checkpoint(model, 2)]), network(("0", "1", "3")))[0] == NAMES


def test_a_parameter_that_moved_in_the_middle_alone():
    model, states = network(), []
    for step, value in enumerate([0.0, 1.0, 0.0]):
        model[0].bias.data.fill_(value)
        model[3].bias.data.fill_(float(step))
        states.append(checkpoint(model, step))
    assert trained_parameters(sp.Trajectory(states), network())[0] == ["0.bias", "3.bias"]


def test_one_checkpoint_with_its_optimizers_state():
    model = network(freeze=("0", "1"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    run = sp.Trajectory([checkpoint(model, 2, optimizer)], optimizer=sp.Adam())
    assert trained_parameters(run, network())[0] == HEAD


def test_all_stages_count(tmp_path):
    model = network()
    stages = []
    for number, layer in enumerate((0, 3)):
        optimizer = torch.optim.SGD(model[layer].parameters(), lr=0.1)
        recorder = sp.Recorder(model, optimizer, tmp_path / str(number), every=2, stage=str(number))
        steps(model, optimizer, 4, recorder)
        stages.append(recorder.stage())
    assert trained_parameters(sp.Trajectory.from_stages(stages), network())[0] == ["0.weight", "0.bias", *HEAD]


def two_stages(directory, recorded):
    """All parameters first, then the head, with one checkpoint at the end of each; the optimizers are known or not."""
    model, stages = network(), []
    for name, freeze in (("pretrain", ()), ("finetune", ("0", "1"))):
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(part.split(".")[0] not in freeze)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        recorder = sp.Recorder(model, optimizer, directory / name, stage=name) if recorded else None
        steps(model, optimizer, 4, recorder)
        stages.append(recorder.stage() if recorded else sp.Stage(name, [checkpoint(model, 4)]))
    return sp.Trajectory.from_stages(stages)


def test_what_pretraining_alone_moved_counts_though_its_end_is_its_one_checkpoint(tmp_path):
    """Between the two checkpoints there is no difference but the head's: that is the second stage's."""
    assert trained_parameters(two_stages(tmp_path, recorded=True), network())[0] == NAMES
    run = two_stages(tmp_path, recorded=False)
    names, reason = trained_parameters(run, network())
    assert names == NAMES
    assert "nothing says what stage 'pretrain' did, those that require a gradient" in reason
    assert trained_parameters(run, network(freeze=("0",)))[0] == NAMES[2:]


def test_an_adapters_file_names_its_own(tmp_path):
    model = network()
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: model.state_dict()[name].clone() for name in HEAD}, file)
    run = sp.Trajectory([sp.Checkpoint(file, step=1, lr=0.1)])
    assert trained_parameters(run, network())[0] == HEAD


def test_tied_parameters_are_compared_under_one_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    first = checkpoint(model, 0)
    model[2].weight.data += 1
    assert trained_parameters(sp.Trajectory([first, checkpoint(model, 1)]), model)[0] == ["0.weight"]


def test_a_build_says_what_it_leaves_out_and_can_be_told_otherwise(tmp_path, capsys):
    model = network(freeze=("0", "1"))
    run = recorded(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = TensorDataset(*BATCH)
    for chosen, names, said in ((None, HEAD, True), (["*"], NAMES, False), (["0.*"], ["0.weight", "0.bias"], False)):
        path = tmp_path / f"bank_{names[0]}_{len(names)}"
        bank = sp.build(network(), sp.Classification(), run, data, path, sketch=sp.Sketch(16), parameters=chosen)
        assert bank.space_spec["names"] == names
        assert sp.open(path).parameter_choice.startswith(f"{len(names)} of 6 parameters, ")
        assert ("attributing through 2 of 6 parameters, 21 of 59 numbers" in capsys.readouterr().err) is said


def test_a_build_says_what_makes_it_slow(tmp_path, capsys):
    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 2)

        def forward(self, x):
            return self.head(x * self.scale)

    data = TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    for number, (chosen, said) in enumerate(((["*"], False), (["scale"], True), (["head.*"], False))):
        model = Own(3)
        run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
        sp.build(model, sp.Classification(), run, data, tmp_path / str(number), sketch=sp.Sketch(16), parameters=chosen)
        words = "torch's vmap or one example at a time, slower than by layers: scale: no rule covers Own"
        assert (words in capsys.readouterr().err) is said


def test_the_default_predicts_retraining_as_well_as_the_trained_parameters_do(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 3))
    model[0].requires_grad_(False)
    x, q = torch.randn(30, 8), torch.randn(10, 8)
    y, qy = ((v[:, 0] > 0).long() + (v[:, 1] > 0.5).long() for v in (x, q))
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def retrain(weight, folder=None):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.5)
        recorder = sp.Recorder(model, optimizer, folder, every=50) if folder else None
        for _ in range(150):
            optimizer.zero_grad()
            (cross_entropy(model(x), y, reduction="none") * weight).mean().backward()
            optimizer.step()
            if recorder:
                recorder.step()
        with torch.no_grad():
            z, own = model(q).double(), one_hot(qy, 3).bool()
        return z[own] - z.masked_fill(own, -torch.inf).logsumexp(1), recorder

    full, recorder = retrain(torch.ones(30), tmp_path / "run")
    actual = torch.stack([full - retrain((torch.arange(30) != i).float())[0] for i in range(30)], 1).numpy()
    retrain(torch.ones(30))
    size = sum(p.numel() for p in model.parameters())  # more columns than coordinates: the rest stays 0
    bank = sp.build(
        model, sp.Classification(), recorder.trajectory(), TensorDataset(x, y), tmp_path / "bank",
        sketch=sp.Sketch(size, kind="identity"), storage="float32", progress=False,
    )  # fmt: skip
    scores = sp.Source(bank, model=model, progress=False).score(TensorDataset(q, qy)).values
    assert np.mean([np.corrcoef(scores[i], actual[i])[0, 1] for i in range(10)]) > 0.8


@pytest.mark.parametrize(
    ("dim", "kind", "said"), [(60, "tensor", True), (59, "tensor", False), (59, "identity", False)]
)
def test_a_sketch_that_is_larger_than_the_gradients_is_told(tmp_path, capsys, dim, kind, said):
    model = network()
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    options = {"sketch": sp.Sketch(dim, kind), "parameters": ["*"]}
    sp.build(model, sp.Classification(), trajectory, TensorDataset(*BATCH), tmp_path / "bank", **options)
    told = 'k = 60 is more than the 59 numbers of a gradient: Sketch(59, "identity") (on the command line'
    assert (told in capsys.readouterr().err) == said


@pytest.mark.parametrize("rounded_first", [False, True])
def test_weights_that_were_saved_rounded_did_not_move(rounded_first):
    """As where one stage's weights were saved in float32, and another's in half precision."""
    model, stages = network(), []
    for place, kept in enumerate((NAMES, HEAD)):
        optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name in kept], lr=0.1)
        dtype = torch.bfloat16 if rounded_first == (place == 0) else torch.float32
        points = []
        for step in (5, 10):
            steps(model, optimizer, 5)
            state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in model.state_dict().items()}
            points.append(sp.Checkpoint(state, step, lr=0.1))
        stages.append(sp.Stage(f"stage {place}", points, sp.SGD()))
    assert left_alone(stages, model) == [frozenset(), frozenset(NAMES) - frozenset(HEAD)]


def two_optimizers(model, count, recorder, second):
    first = recorder._optimizer
    for _ in range(count):
        for optimizer in (first, second):
            optimizer.zero_grad()
        cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        first.step()
        second.step()
        recorder.step()


@pytest.mark.parametrize("stages", [1, 2])
def test_what_a_second_optimizer_trains_is_named(tmp_path, stages):
    """Its parameters are left out, as nothing says how far they went; that must not pass without a word."""
    model, made = network(), []
    for number in range(stages):
        body = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1)
        recorder = sp.Recorder(model, body, tmp_path / str(number), every=3, stage=f"stage{number}")
        two_optimizers(model, 6, recorder, torch.optim.AdamW(model[3].parameters(), lr=0.1))
        made.append(recorder.stage())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        names, _ = trained_parameters(sp.Trajectory.from_stages(made), model)
    assert set(names) == set(NAMES) - set(HEAD)
    expected = [f"parameters ['3.bias', '3.weight'] (2) moved in stage 'stage{number}'," for number in range(stages)]
    assert [str(warning.message)[: len(expected[0])] for warning in told] == expected

"""What is captured while training is what the formulas say, against vmap(grad) and against a bank built afterwards."""

import pytest
import torch
from captured_runs import (
    Decoder,
    Twin,
    batches_of,
    convolutional,
    data_for,
    example_gradients,
    loss_of,
    mlp,
    rows_of,
    size_of,
    task_for,
    train,
)
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp


def close(a, b, tolerance=1e-5):
    return float((a - b).norm()) <= tolerance * float(b.norm())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


@pytest.mark.parametrize("make", [mlp, convolutional, Decoder])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_and_curvature_are_the_weighted_sums_of_the_steps_gradients(tmp_path, make, optimizer):
    torch.manual_seed(3)
    model = make()
    twin = Twin(12, size_of(model))
    tokens = 5**0.5 if make is Decoder else 1.0  # of a mean over five counted tokens

    def before_step(index, inputs, labels, rate):
        twin.add(index, example_gradients(model, inputs, labels), rate, tokens)

    made = OPTIMIZERS[optimizer](model.parameters())
    recorder = train(tmp_path / "run", model, size=5, steps=7, before_step=before_step, optimizer=made)
    bank = recorder.bank(storage="float32")
    assert close(rows_of(bank), twin.bank_rows())
    assert close(bank.stages[0].captured_curvature(0)[0], twin.bank_curvature())
    assert [point.step for point in bank.query_points()] == [3, 6, 7]
    assert bank.verify().ok


def test_each_segment_has_its_own_rows(tmp_path):
    torch.manual_seed(1)
    model = mlp()
    twins = [Twin(12, size_of(model)) for _ in range(3)]
    steps = iter(range(9))

    def before_step(index, inputs, labels, rate):
        twins[[0, 0, 1, 1, 1, 1, 2, 2, 2][next(steps)]].add(index, example_gradients(model, inputs, labels), rate)

    recorder = train(tmp_path / "run", model, before_step=before_step, segment_ends=[2, 6], examples=12)
    stage = recorder.stage()
    assert [[stage.checkpoints[place].step for place in group] for group in stage.segment_indices] == [[2], [3, 6], [9]]
    bank = recorder.bank(storage="float32")
    for segment, twin in enumerate(twins):
        assert close(rows_of(bank, segment), twin.bank_rows())
        assert close(bank.stages[0].captured_curvature(segment)[0], twin.bank_curvature())
    cuts, whole = bank.stages[0].record.cut(), recorder.stage().describe().cut()
    assert [cut.time for cut in cuts] == pytest.approx([cut.time for cut in whole])


@pytest.mark.parametrize("n", [12, 14])
@pytest.mark.parametrize("kind", ["identity", "sparse", "tensor"])
def test_frozen_weights_give_the_bank_that_is_built_afterwards(tmp_path, kind, n):
    """One epoch at a learning rate that moves nothing, also where the last batch is short."""
    torch.manual_seed(0)
    model = mlp()
    inputs, labels = data_for(model, n)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    sketch = sp.Sketch(size_of(model) if kind == "identity" else 32, kind)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", capture=sketch, task=sp.Classification())
    for index in batches_of(n, 4, -(-n // 4)):
        optimizer.zero_grad()
        loss_of(model, inputs[index], labels[index]).backward()
        optimizer.step()
        recorder.step(ids=index)
    data = TensorDataset(inputs, labels)
    options = {"storage": "float32"}
    captured = recorder.bank(tmp_path / "captured", **options)
    built = sp.build(
        model, sp.Classification(), recorder.trajectory(), data, tmp_path / "built", sketch=sketch, parameters=["*"],
        progress=False, **options,
    )  # fmt: skip
    assert close(rows_of(captured), rows_of(built))
    own, other = (
        sp.Source(bank, model=model, curvature="empirical_fisher", progress=False) for bank in (captured, built)
    )
    assert own.segments[0].trace == pytest.approx(other.segments[0].trace, rel=1e-5)
    a, b = (torch.from_numpy(source.score(data).to_numpy()) for source in (own, other))
    assert close(a, b, 1e-4)


def test_ids_travel_with_mappings_and_pairs(tmp_path):
    """A batch entry "index" goes to the model's call and not into it; pairs give the index to the loop."""
    torch.manual_seed(0)
    model, reference = Decoder(), Decoder()
    reference.load_state_dict(model.state_dict())
    tokens, _ = data_for(model, 12)
    data = sp.IndexedDataset([{"input_ids": row, "labels": row} for row in tokens])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sketch = sp.Sketch(64)
    recorder = sp.Recorder(model, optimizer, tmp_path / "a", capture=sketch, task=sp.CausalLM(), draw_every=0)
    seen = []
    for batch in DataLoader(data, batch_size=4, shuffle=True):
        seen.append(batch["index"])
        logits = model(**batch)
        optimizer.zero_grad()
        log = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        log.backward()
        optimizer.step()
        recorder.step()
    twin = sp.Recorder(
        reference, torch.optim.SGD(reference.parameters(), lr=0.1), tmp_path / "b", capture=sketch, task=sp.CausalLM(),
        draw_every=0,
    )  # fmt: skip
    pairs = sp.IndexedDataset(TensorDataset(tokens))
    for index in seen:
        places, (rows,) = next(iter(DataLoader(pairs, batch_size=4, sampler=index.tolist())))
        twin._optimizer.zero_grad()
        loss_of(reference, rows, rows).backward()
        twin._optimizer.step()
        twin.step(ids=places, batch={"input_ids": rows, "labels": rows})
    assert close(rows_of(recorder.bank()), rows_of(twin.bank()))


def test_a_larger_training_set_and_ids_of_ones_own(tmp_path):
    recorder = train(tmp_path / "run", examples=15)
    unseen = r"nothing was captured of 3 of the 15 .*ids \['z12', 'z13', 'z14'\]: their scores will be zero"
    with pytest.warns(UserWarning, match=unseen):
        bank = recorder.bank(ids=[f"z{i}" for i in range(15)])
    rows = rows_of(bank)
    assert bank.ids[-1] == "z14"
    assert rows[:12].any(dim=1).all()
    assert not rows[12:].any()
    with pytest.warns(UserWarning, match=unseen):
        again = recorder.bank(ids=[f"z{i}" for i in range(15)])  # as a call that was killed is repeated
    assert again.fingerprint == bank.fingerprint


def test_memory_on_the_disk_gives_the_same_bits(tmp_path):
    banks = [train(tmp_path / memory, memory=memory).bank() for memory in ("ram", "disk")]
    assert torch.equal(rows_of(banks[0]), rows_of(banks[1]))


def test_task_for_every_model_is_its_loss():
    for make in (mlp, convolutional, Decoder):
        model = make()
        inputs, labels = data_for(model, 5)
        batch = {"input_ids": inputs, "labels": labels} if make is Decoder else (inputs, labels)
        task = task_for(model)
        output = task.output(model, batch)
        first, _ = task.loss_derivatives(output, batch)
        parameters = list(model.parameters())
        by_task = torch.autograd.grad((first * output).mean(), parameters)
        by_loss = torch.autograd.grad(loss_of(model, inputs, labels), parameters)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(by_task, by_loss, strict=True))

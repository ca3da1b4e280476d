"""Gradients of several passes before a step, and losses that are sums: how many, and of how many examples."""

import pytest
import torch
from captured_runs import Loop, rows_of


@pytest.mark.parametrize("divided", [True, False])
def test_accumulated_gradients_give_the_rows_of_the_whole_batch(tmp_path, divided):
    loop = Loop(tmp_path / "run")
    for pair in zip(loop.batches[::2], loop.batches[1::2], strict=True):
        loop.optimizer.zero_grad()
        for index in pair:
            loop.expect(index)
            (loop.loss(index) / (2 if divided else 1)).backward()
        loop.optimizer.step()
        loop.recorder.step(ids=torch.cat(pair))
    expected = loop.twin.bank_rows()
    options = {} if divided else {"accumulation": 2}
    bank = loop.recorder.bank(storage="float32", **options)
    assert float((rows_of(bank) - expected).norm()) <= 1e-5 * float(expected.norm())
    curvature = bank.stages[0].captured_curvature(0)[0]
    assert float((curvature - loop.twin.bank_curvature()).norm()) <= 1e-5 * float(curvature.norm())


def test_a_loss_that_is_a_sum_is_told_apart_from_its_mean(tmp_path):
    loop = Loop(tmp_path / "run", lr=0.02)
    for index in loop.batches:
        loop.expect(index)
        loop.optimizer.zero_grad()
        (4 * loop.loss(index)).backward()
        loop.optimizer.step()
        loop.recorder.step(ids=index)
    expected = loop.twin.bank_rows()
    bank = loop.recorder.bank(storage="float32", loss_reduction="sum", batch_size=4)
    assert float((rows_of(bank) - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(("sizes", "told"), [((4, 4, 2), 4), ((4, 4, 4), 3), ((2, 2), 4), ((4, 4, 2), 1)])
def test_sums_over_batches_of_several_sizes_or_another_one_are_refused(tmp_path, sizes, told):
    """Examples of the smaller batch had rows of half their size."""
    loop = Loop(tmp_path / "run", lr=0.02)
    for index, size in zip(loop.batches, sizes, strict=False):
        loop.optimizer.zero_grad()
        (size * loop.loss(index[:size])).backward()
        loop.optimizer.step()
        loop.recorder.step(ids=index[:size])
    with pytest.raises(
        ValueError, match=rf"batch_size={told} .* had {sum(sizes) / len(sizes):.4g} examples on average"
    ):
        loop.recorder.bank(loss_reduction="sum", batch_size=told)


@pytest.mark.parametrize(("numbers", "told"), [((3, 3, 1), 3), ((2, 2), 3), ((3, 3), 2)])
def test_undivided_gradients_of_unequal_steps_or_of_another_number_are_refused(tmp_path, numbers, told):
    """A step at the end of an epoch, of fewer micro-batches, had rows that were too short, and all too long a time."""
    loop = Loop(tmp_path / "run", lr=0.02)
    batches = iter(loop.batches * 2)
    for number in numbers:
        loop.optimizer.zero_grad()
        some = [next(batches) for _ in range(number)]
        for index in some:
            loop.loss(index).backward()
        loop.optimizer.step()
        loop.recorder.step(ids=torch.cat(some))
    mean = sum(numbers) / len(numbers)
    with pytest.raises(ValueError, match=rf"^accumulation={told}, .* had {mean:.4g} forward passes on average"):
        loop.recorder.bank(accumulation=told)

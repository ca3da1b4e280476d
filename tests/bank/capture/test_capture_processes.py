"""Processes that train together on batches of different sizes capture what each example gave the step's gradient."""

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from captured_runs import Twin, data_for, example_gradients, loss_of, mlp, rows_of, size_of
from preloaded import preloaded
from torch import nn

import source_proj as sp

N, STEPS, RATE = 12, 6, 0.1


def steps_of(seed):
    """Of each step its micro-batches, and of each of these both processes' examples: as many as come."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(STEPS):
        sizes = torch.randint(1, 4, (int(torch.randint(1, 3, (1,), generator=generator)), 2), generator=generator)
        parts = torch.randperm(N, generator=generator).split([*sizes.flatten().tolist(), N - int(sizes.sum())])
        steps.append([parts[2 * i : 2 * i + 2] for i in range(len(sizes))])
    return steps


def network():
    torch.manual_seed(0)
    return mlp()


def joined(parallel, inputs, *_):
    with parallel.join(), pytest.raises(sp.GradientError, match=r"DistributedDataParallel\.join\(\), can't add up"):
        parallel(inputs[:2])


def thrown_away(parallel, inputs, labels, optimizer, recorder):
    """One process alone zeroes a gradient, long after the steps that are always audited."""
    for step in range(30):
        thrown = step == 29 and dist.get_rank() == 0
        if thrown:
            with parallel.no_sync():
                loss_of(parallel, inputs[:2], labels[:2]).backward()
        optimizer.zero_grad()
        loss_of(parallel, inputs[2:4], labels[2:4]).backward()
        if step == 29:
            with pytest.raises(sp.GradientError, match=r"do not sum to the gradient.*a batch that was thrown away"):
                optimizer.step()
            return
        optimizer.step()
        recorder.step(ids=[2, 3])


def worker(rank, folder, seed, refused):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    sketch, (inputs, labels) = sp.Sketch(size_of(model), "identity"), data_for(model, N)
    recorder = sp.Recorder(model, optimizer, folder / "run", every=4, capture=sketch, task=sp.Classification())
    recorder.restore()
    if refused is not None:
        refused(parallel, inputs, labels, optimizer, recorder)
    else:
        for batches in steps_of(seed):
            optimizer.zero_grad()
            for place, ids in enumerate(batches, 1):
                with parallel.no_sync() if place < len(batches) else nullcontext():
                    (loss_of(parallel, inputs[ids[rank]], labels[ids[rank]]) / len(batches)).backward()
            optimizer.step()
            recorder.step(ids=torch.cat([ids[rank] for ids in batches]))
        recorder.bank(storage="float32")
    recorder.close()
    dist.barrier()
    del parallel  # first: where its reducer holds the group last, torch joins a thread that waits for the GIL
    gc.collect()
    dist.destroy_process_group()


def run(folder, seed=0, refused=None):
    preloaded()
    torch.multiprocessing.start_processes(worker, (folder, seed, refused), nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_of_different_sizes_count_as_they_do_in_the_gradient(tmp_path, seed):
    run(tmp_path, seed)
    bank, model = sp.open(tmp_path / "run" / "bank"), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    inputs, labels = data_for(model, N)
    twin = Twin(N, size_of(model))
    for batches in steps_of(seed):
        parts = [part for ids in batches for part in ids]  # whose losses' mean is what is trained on
        index = torch.cat(parts)
        weights = torch.cat([torch.full((len(part), 1), len(index) / len(parts) / len(part)) for part in parts])
        twin.add(index, weights * example_gradients(model, inputs[index], labels[index]), RATE)
        optimizer.zero_grad()
        (sum(loss_of(model, inputs[part], labels[part]) for part in parts) / len(parts)).backward()
        optimizer.step()
    for got, expected in (
        (rows_of(bank), twin.bank_rows()),
        (bank.stages[0].captured_curvature(0)[0], twin.bank_curvature()),
    ):
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("refused", [joined, thrown_away], ids=["join", "thrown away"])
def test_what_processes_cannot_capture_together_is_refused_in_all(tmp_path, refused):
    run(tmp_path, refused=refused)

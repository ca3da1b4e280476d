import json
import time
from dataclasses import replace

import pytest

import source_proj as sp
from source_proj._errors import BankError
from source_proj.bank.build.claims import Claims, heartbeats
from source_proj.distribute import status

N = 20


@pytest.fixture
def bank(tmp_path):
    """A third of 20 examples at two checkpoints, in shards of 4."""
    import torch
    from torch import nn

    model = nn.Linear(2, 3)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=step, lr=0.1) for step in (1, 2)])
    data = torch.utils.data.TensorDataset(torch.randn(N, 2), torch.arange(N) % 3)
    options = {"sketch": sp.Sketch(dim=16), "batch_size": 4, "shard_rows": 4, "shard": (1, 3), "progress": False}
    return sp.build(model, sp.Classification(), run, data, tmp_path / "bank", **options)


def put(bank, beat):
    from source_proj._io.json_records import write_record

    bank.store.put({f"claims/workers/{beat.owner}.partial": json.dumps(write_record(beat)).encode()})


def test_a_number_that_no_process_has_is_of_a_dead_one(bank):
    with Claims(bank.store, 300.0, (0, 3)):
        (beat,) = heartbeats(bank.store)
    put(bank, replace(beat, pid=1 << 40))
    (worker,) = status(bank.path).workers
    assert worker.dead


def test_rows_are_counted_by_their_marks(bank):
    now = status(bank.path)
    assert (now.rows_done, now.rows, now.finalized) == (12, 2 * N, False)
    assert now.seconds_left is None
    assert not now.workers


def test_rates_of_the_living_say_how_long_it_takes(bank):
    claims = Claims(bank.store, 100.0, (1, 3))
    with claims:
        (beat,) = heartbeats(bank.store)
        now = time.time()
        put(bank, replace(beat, started=now - 8, time=now - 1, rows=14))
        put(bank, replace(beat, owner="0" * 32, started=now - 410, time=now - 400, rows=100))  # silent for too long
        said = status(bank.path)
        assert said.rate == pytest.approx(2)
        assert said.seconds_left == pytest.approx((40 - 12) / 2)
        assert [worker.dead for worker in said.workers] == [False, True]
        assert said.dead[0].silent == pytest.approx(400, abs=5)
    assert len(status(bank.path).workers) == 1  # the other one ended in order


def test_a_clock_that_is_ahead_makes_nobody_younger(bank):
    with Claims(bank.store, 100.0, (1, 3)):
        (beat,) = heartbeats(bank.store)
        put(bank, replace(beat, time=beat.time + 3600))
        assert [worker.silent for worker in status(bank.path).workers] == [0]


def test_a_bank_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(BankError, match="there is no bank"):
        status(tmp_path / "bank")

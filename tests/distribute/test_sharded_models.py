"""One model over several processes: FSDP2 with gloo gives the rows of one process, whatever else it is told."""

import json
import subprocess
import sys

import pytest
import sharded_run
import torch
from cluster_run import environment
from sharded_run import TASK, VARIANTS, build, data, decoder

import source_proj as sp


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The bank of one process and of the whole model, beside which others are made."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    build(decoder(0), folder / "whole")
    return folder


def rows(bank):
    return torch.cat([block.rows for c in range(2) for block in bank.stages[0].iter_rows(c)])


@pytest.mark.parametrize(("processes", "variants"), [(2, list(VARIANTS)), (4, ["plain"])])
def test_the_processes_of_one_model_build_the_bank_of_one_process(home, processes, variants):
    whole = sp.open(home / "whole")
    asked = sp.Source(whole, model=decoder(0), task=TASK).score(data(3)).to_numpy()
    program = [sys.executable, sharded_run.__file__, str(home), str(processes), *variants]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in variants:
        path = home / f"{name}_{processes}"
        bank = sp.open(path)
        assert bank.verify().ok
        expected = rows(whole)
        assert (rows(bank) - expected).norm() <= 1e-6 * expected.norm()
        for rank in range(processes):
            facts = json.loads((home / f"{name}_{processes}.{rank}.json").read_text())
            torch.testing.assert_close(torch.tensor(facts["scores"]), torch.from_numpy(asked), rtol=1e-4, atol=1e-6)
            assert facts["held"] <= facts["whole"] * (1.1 / processes)  # slices of short dims are rounded up
    refused = [json.loads((home / f"refusals_{processes}.{rank}.json").read_text()) for rank in range(processes)]
    for words in refused:
        shares, general, split, replicated = words
        assert "act as one, and must be given the same path, shard and takeover" in shares
        assert "sharded over processes (FSDP2), which hooks alone can serve, not 'general'" in general
        assert "tensor or expert parallelism" in split
        assert "blocks.0" in split
        assert "fully_shard alone" in split
        assert "is a DTensor that every process holds whole (placements (Replicate(),))" in replicated

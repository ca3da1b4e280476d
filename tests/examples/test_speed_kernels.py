"""The table of kernels at tiny sizes: every kernel on every backend that is here, and the words for the rest."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from source_proj.kernels import available_backends
from source_proj.kernels.scoring import scoring_backends

SPEED = Path(__file__).parents[2] / "examples" / "speed"
SIZES = {
    "batch": 17, "dim": 64, "coordinates": 300, "dense-coordinates": 40, "features": 6, "steps": 3, "channels": 4,
    "side": 4, "rows": 50, "queries": 2, "copied": 1000, "product": 8, "repetitions": 2, "threads": 1,
}  # fmt: skip
TINY = ["--device", "cpu", *(part for name, value in SIZES.items() for part in (f"--{name}", str(value)))]
ALL = ["sparse", "linear", "linear-tokens", "convolution", "dense", "kronecker"]  # and "search"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, imported from its own folder as when it is run."""
    monkeypatch.syspath_prepend(str(SPEED))
    for name in ("kernel_speed", "_bounds", "_fast_jl_build"):  # another test may have met a module of that name
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module("kernel_speed")
    torch.set_num_threads(threads)
    for name in ("kernel_speed", "_bounds", "_fast_jl_build"):
        sys.modules.pop(name, None)


def run(script, folder, *arguments):
    script.main([*TINY, "--json", str(folder / "speed.json"), *arguments])
    return json.loads((folder / "speed.json").read_text())


def test_every_kernel_on_every_backend(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trak", None)
    found = run(script, tmp_path)
    pairs = {(row["kernel"], row["backend"]) for row in found["rows"]}
    expected = {(kernel, name) for kernel in ALL for name in available_backends()}
    expected |= {("search", name) for name in scoring_backends("cpu")}
    assert pairs >= expected | {("dense", "matmul")}
    text = capsys.readouterr().out
    for kernel, backend in pairs:
        assert any(line.split()[:2] == [kernel, backend] for line in text.splitlines())
    for what in ("fast-jl (rademacher): backend 'fast-jl' needs", "trak (rademacher): "):
        assert f"not here: {what}" in text


def test_bounds_and_work_are_what_the_page_says(script, tmp_path):
    found = run(script, tmp_path)
    rows = {row["kernel"]: row for row in found["rows"] if row["backend"] == "torch"}
    assert set(found["rates"]) == {"copy", "float32 product"}
    assert rows["sparse"]["bytes"] == 4 * 17 * 300
    assert rows["sparse"]["operations"] == 17 * 300
    assert rows["dense"]["operations"] == 2 * 17 * 40 * 64
    assert rows["linear"]["bytes"] == 4 * 17 * 12
    assert rows["linear-tokens"]["operations"] == 17 * 36 * 7  # three products and sums each, and one into the sketch
    assert rows["convolution"]["bytes"] == 4 * 17 * 4 * (16 + 36)  # right is padded
    assert rows["kronecker"]["operations"] == 2 * 17 * 3 * (6 * 8 + 6 * 8 + 64)
    for row in found["rows"]:
        assert row["reached"] == pytest.approx(row["bound_seconds"] / row["seconds"])
        assert row["bound"] in found["rates"]


def test_some_kernels_only(script, tmp_path):
    rows = run(script, tmp_path, "--kernels", "linear", "sparse")["rows"]
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == ["linear", "sparse"]


def test_trak_is_timed_where_it_is(script, tmp_path, monkeypatch):
    class BasicProjector:
        def __init__(self, grad_dim, proj_dim, seed, proj_type, device):
            assert (grad_dim, proj_dim, proj_type) == (40, 64, "rademacher")

        def project(self, grads, model_id):
            assert grads.shape == (17, 40)

    module = types.ModuleType("trak.projectors")
    module.BasicProjector, module.ProjectionType = BasicProjector, types.SimpleNamespace(rademacher="rademacher")
    monkeypatch.setitem(sys.modules, "trak", types.ModuleType("trak"))
    monkeypatch.setitem(sys.modules, "trak.projectors", module)
    found = run(script, tmp_path, "--kernels", "dense")
    assert "trak" in {row["backend"] for row in found["rows"]}
    assert not any("trak" in name for name in found["missing"])


def test_medians_of_interleaved_calls_and_slices_scaled_up(script, monkeypatch):
    """On a clock that the ways themselves advance."""
    now, calls = [0.0], []

    def way(name, seconds, scale=1):
        steps = iter(seconds)

        def step():
            calls.append(name)
            now[0] += next(steps)

        return script.Way(name, step, scale)

    monkeypatch.setattr(sys.modules["_bounds"].time, "perf_counter", lambda: now[0])
    ways = [way("slice", [100, 1, 2, 9], 16), way("whole", [100, 5, 4, 3])]  # the first call warms up
    assert script.interleaved(ways, 3, torch.device("cpu")) == {"slice": 32, "whole": 4}
    assert calls == ["slice", "whole"] * 4


def test_fast_jl_is_built_for_the_device_or_refused(script, tmp_path, monkeypatch):
    build = sys.modules["_fast_jl_build"]
    line = "from os import environ\n\nenviron['TORCH_CUDA_ARCH_LIST']=\"7.0+PTX\"\n"
    assert build.with_architecture(line, "9.0") == line.replace('"7.0+PTX"', "'9.0'")
    for wrong in ("setup()\n", line * 2):
        with pytest.raises(ValueError, match=r"sets TORCH_CUDA_ARCH_LIST [02] times"):
            build.with_architecture(wrong, "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"CUDA device.*nvcc"):
        run(script, tmp_path, "--build-fast-jl")

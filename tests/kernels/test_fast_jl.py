"""The adapter to fast_jl against a stand-in that follows the library's signature, and the library itself on a GPU."""

import json
import types

import numpy as np
import pytest
import torch

import source_proj as sp
from source_proj import kernels
from source_proj.kernels import fast_jl, philox4x32
from source_proj.kernels.philox import sign_bits
from source_proj.sketch import Sketch

BLOCK, DIM, SMS = 1 << 20, 512, 132
HALF = 2**-11  # the relative error of rounding to float16


def project(limit):
    """``project_rademacher_<limit>(input, columns, seed, tiles)`` of a library with other random numbers.

    As there: the matrix is a function of seed, width and tiles; input is rounded to float16; sums are float32.
    """

    def function(x, columns, seed, tiles):
        assert x.is_contiguous()
        assert x.dtype in (torch.float32, torch.float16)
        assert x.numel() < 2**32
        assert columns % 512 == 0
        assert 0 <= seed < 2**32
        assert 0 < len(x) <= limit  # larger batches are none of the adapter's business
        used = np.flatnonzero(x.numpy().any(axis=0))  # few of a block's million
        words = philox4x32(used[:, None], x.shape[1], np.arange(columns // 128), tiles, seed=seed)
        bits = sign_bits(words.reshape(len(used), columns // 32))
        return x[:, used].half().float() @ torch.from_numpy(1 - 2 * bits.astype(np.float32))

    return function


def stand_in(**changes):
    functions = {f"project_rademacher_{limit}": project(limit) for limit in (8, 16, 32)}
    return types.SimpleNamespace(**{**functions, **changes})


@pytest.fixture
def install(monkeypatch):
    """A function that puts a library on a device with so many multiprocessors in place of what is found here."""

    def put(library, multiprocessors=SMS):
        found = fast_jl.FastJL(library, multiprocessors, torch.device("cpu"))
        monkeypatch.setattr(fast_jl, "find_fast_jl", lambda device=None: found)

    return put


@pytest.fixture
def there(install):
    install(stand_in())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jl(**options):
    return Sketch(**{"dim": DIM, "kind": "rademacher", "backend": "fast-jl", **options})


def close(got, expected, x):
    """Within the rounding of x (B, d) to float16, plus float32 sums: the error of sum_i +-x_i / sqrt(k)."""
    bound = (HALF + 1e-5) * x.abs().sum(dim=1, keepdim=True) * DIM**-0.5
    return bool(((got - expected).abs() <= bound).all())


# The matrix ----------------------------------------------------------------------------------------------------------


def test_entries_are_signs_of_each_blocks_own_matrix(there):
    """Naive twin: whole blocks given to the library, each with the seed of its index."""
    sketch, count = jl(seed=2**40 + 3), 40
    start = 3 * BLOCK - 25
    matrix = sketch.matrix(start, start + count)
    assert torch.equal(matrix.abs(), torch.full((DIM, count), DIM**-0.5))
    for block, here in ((2, slice(0, 25)), (3, slice(25, 40))):
        padded = torch.zeros(here.stop - here.start, BLOCK)
        places = (start + torch.arange(count) - block * BLOCK)[here]
        padded[torch.arange(len(padded)), places] = 1
        seed = int(philox4x32(block, 0, 0, 0x464A4C42, seed=2**40 + 3)[0])
        assert torch.equal(project(32)(padded, DIM, seed, SMS) * DIM**-0.5, matrix[:, here].T)


@pytest.mark.parametrize("offset", [0, 7, BLOCK - 15, 2**40 + 7])
def test_is_its_dense_matrix(there, offset):
    sketch, x = jl(), normal(3, 32)
    expected = x.double() @ sketch.matrix(offset, offset + 32).T.double()
    assert close(sketch(x, offset), expected, x)
    assert sketch(x, offset).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 33])
def test_batches_of_any_size_have_the_same_rows(there, batch):
    sketch, x = jl(), normal(batch, 20)
    one_by_one = torch.cat([sketch(row[None], 5) for row in x])
    # The order of float32 sums is the matrix product's own affair; the rounding to float16 is the same.
    torch.testing.assert_close(sketch(x, 5), one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [100, BLOCK - 130])
def test_pieces_sum_to_the_whole(there, offset):
    sketch, x = jl(), normal(4, 300)
    pieces = sum(sketch(x[:, a:b], offset + a) for a, b in ((0, 1), (1, 120), (120, 300)))
    whole = sketch(x, offset)
    assert (pieces - whole).norm() <= 1e-6 * whole.norm()


def test_seeds_and_multiprocessors_give_other_matrices(install):
    found = []
    for seed, multiprocessors in ((0, 132), (1, 132), (0, 108)):
        install(stand_in(), multiprocessors)
        found.append(jl(seed=seed).matrix(0, 32))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        agreement = float((found[one] * found[other]).sum() * DIM / found[one].numel())
        assert abs(agreement) <= 5 / found[one].numel() ** 0.5
    portable = Sketch(DIM, "rademacher").matrix(0, 32)
    assert not torch.equal(found[0], portable)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-9, 1.0, 1e6, 1e36])
def test_gradients_out_of_the_range_of_float16_are_kept(there, scale):
    x = normal(2, 30) * scale
    expected = x.double() @ jl().matrix(0, 30).T.double()
    got = jl()(x).double()
    # 2^-149 is the step of float32 itself, which matters for the first scale.
    assert bool(((got - expected).abs() <= (HALF + 1e-5) * x.double().abs().sum(1, True) * DIM**-0.5 + 2**-149).all())


def test_rows_of_zeros_and_rows_that_are_not_finite(there):
    x = normal(4, 30)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    got = jl()(x)
    assert torch.equal(got[0], torch.zeros(DIM))
    assert got[1:3].isnan().all()
    assert close(got[3:], x[3:].double() @ jl().matrix(0, 30).T.double(), x[3:])


@pytest.mark.parametrize("offset", [3, BLOCK - 50])
def test_fused_paths_equal_given_rows(there, offset):
    sketch = jl()
    left, right = normal(3, 4, 9, seed=1), normal(3, 4, 13, seed=2)
    rows = torch.einsum("bto,bti->boi", left, right).flatten(1)
    out = torch.zeros(3, DIM)
    sketch.add_outer_(out, left, right, offset)
    sums = torch.einsum("bto,bti->boi", left.abs(), right.abs()).flatten(1)
    assert close(out, sketch(rows, offset).double(), 2 * sums)  # both sides are rounded

    taps, windows = torch.tensor([0, 1, 5]), torch.tensor([0, 2, 4, 6])
    left, right = normal(3, 2, 4, seed=3), normal(3, 3, 12, seed=4)
    reached = right[:, :, taps[:, None] + windows]  # (b, c, j, l)
    rows = torch.einsum("bol,bcjl->bocj", left, reached).flatten(1)
    sums = torch.einsum("bol,bcjl->bocj", left.abs(), reached.abs()).flatten(1)
    out = torch.zeros(3, DIM)
    sketch.add_windows_(out, left, right, taps, windows, offset)
    assert close(out, sketch(rows, offset).double(), 2 * sums)


def test_scattered_rows_equal_their_sum(there):
    sketch, rows = jl(), normal(50, 6)
    generator = torch.Generator().manual_seed(5)
    examples = torch.randint(0, 40, (50,), generator=generator)  # more examples than the library takes at once
    block = -(-BLOCK // 6)  # rows of the table in a block; one of them reaches into the next
    index = torch.tensor([0, 1, block - 1, 12 * block])[torch.randint(0, 4, (50,), generator=generator)]
    out, expected, sums = torch.zeros(40, DIM), torch.zeros(40, DIM), torch.zeros(40, 1)
    sketch.add_at_(out, rows, examples, index, 5, (13 * block, 6))
    for row, example, line in zip(rows, examples.tolist(), index.tolist(), strict=True):
        expected[example] += sketch(row, 5 + 6 * line)
        sums[example] += row.abs().sum()
    assert close(out, expected.double(), 2 * sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_converted_to_float32_by_the_sketch(there, dtype):
    x = normal(2, 70).to(dtype)
    assert torch.equal(jl()(x, 5), jl()(x.float(), 5))


# Refusals ------------------------------------------------------------------------------------------------------------


def test_is_refused_where_it_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(fast_jl.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package fast_jl.*source-proj\[fast-jl\].*nvcc.*compute_70"):
        jl()


def test_is_refused_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(fast_jl.importlib, "import_module", lambda name: stand_in())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, and there is none here"):
        jl()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="needs a CUDA device, and the tensors are on cpu"):
        fast_jl.find_fast_jl(torch.device("cpu"))


def test_the_device_is_asked_for_its_multiprocessors(monkeypatch):
    library = stand_in()
    monkeypatch.setattr(fast_jl.importlib, "import_module", lambda name: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    counts = {torch.device("cuda", 0): 108, torch.device("cuda", 1): 132}
    properties = {device: types.SimpleNamespace(multi_processor_count=count) for device, count in counts.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    assert fast_jl.find_fast_jl() == (library, 132, torch.device("cuda", 1))
    assert fast_jl.find_fast_jl(torch.device("cuda")) == (library, 132, torch.device("cuda", 1))
    assert fast_jl.find_fast_jl(torch.device("cuda", 0)) == (library, 108, torch.device("cuda", 0))


@pytest.mark.parametrize(("dim", "near"), [(1, 512), (511, 512), (4000, 4096)])
def test_other_numbers_of_columns_are_refused(there, dim, near):
    with pytest.raises(ValueError, match=f"dim is {dim}, but fast-jl makes multiples of 512 columns; give {near}"):
        jl(dim=dim)


def test_a_library_without_the_functions_is_refused(install):
    install(types.SimpleNamespace(project_rademacher_8=project(8)))
    with pytest.raises(ValueError, match="lacks project_rademacher_16, project_rademacher_32; install fast-jl"):
        jl()


def test_types_that_the_library_lacks_are_refused(there):
    out, x = torch.zeros(2, DIM), normal(2, 5)
    with pytest.raises(TypeError, match=r"rows is torch\.bfloat16; .*convert with \.float\(\), as Sketch does"):
        fast_jl.fast_jl_add_(out, x.bfloat16(), 0, seed=0)
    with pytest.raises(TypeError, match=r"right is torch\.float64"):
        fast_jl.fast_jl_add_outer_(out, x[:, None], x[:, None].double(), 0, seed=0)
    index = torch.arange(2)
    with pytest.raises(TypeError, match=r"rows is torch\.float64"):
        fast_jl.fast_jl_add_at_(out, x.double(), index, index, seed=0)


def test_serves_dense_signs_only_and_is_never_the_default(there):
    for kind in ("sparse", "kronecker", "identity"):
        with pytest.raises(ValueError, match=f"'fast-jl' cannot serve kind '{kind}'"):
            Sketch(DIM, kind, backend="fast-jl")
    assert "fast-jl" not in kernels.available_backends()
    assert Sketch(DIM, "rademacher").chosen_backend != "fast-jl"
    assert jl().chosen_backend == "fast-jl"
    with pytest.raises(ValueError, match="multiprocessors is 132, but only the matrix of backend 'fast-jl'"):
        Sketch(DIM, "rademacher", multiprocessors=132)


# Silent failures -----------------------------------------------------------------------------------------------------


def broken(x, columns, seed, tiles):
    return torch.zeros(len(x), columns)


def test_silent_zeros_are_an_error(install):
    install(stand_in(project_rademacher_8=broken))
    x = normal(3, 10)
    x[1] = 0
    with pytest.raises(RuntimeError, match=r"zeros only of rows \[0, 2\].*another architecture.*TORCH_CUDA_ARCH_LIST"):
        jl()(x)
    assert torch.equal(jl()(torch.zeros(3, 10)), torch.zeros(3, DIM))


def test_what_is_not_finite_is_an_error(install):
    def wild(x, columns, seed, tiles):
        made = project(8)(x, columns, seed, tiles)
        made[1, 7] = torch.nan
        return made

    install(stand_in(project_rademacher_8=wild))
    with pytest.raises(RuntimeError, match=r"not finite of rows \[1\], which are finite: most likely"):
        jl()(normal(2, 10))


def test_errors_of_the_library_name_the_likely_cause(install):
    def failing(x, columns, seed, tiles):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    install(stand_in(project_rademacher_16=failing))
    with pytest.raises(RuntimeError, match=r"project_rademacher_16 failed on cpu: CUDA error: no kernel.*architecture"):
        jl()(normal(9, 10))


# What a bank writes --------------------------------------------------------------------------------------------------


def test_spec_says_the_backend_and_the_multiprocessors(install):
    install(stand_in())
    spec = json.loads(json.dumps(jl(seed=3).spec()))
    assert spec == {
        "kind": "rademacher", "dim": DIM, "seed": 3, "nnz": 1, "backend": "fast-jl", "multiprocessors": SMS
    }  # fmt: skip
    again = Sketch.from_spec(spec)
    assert again == jl(seed=3)
    install(stand_in(), 108)
    with pytest.raises(ValueError, match=r"made on 132 multiprocessors: cpu has 108"):
        Sketch.from_spec(spec)
    with pytest.raises(ValueError, match=r"made on 132 multiprocessors: cpu has 108"):
        again(normal(2, 5))  # a sketch that outlived its device
    with pytest.raises(ValueError, match=r"entries.*expected.*'multiprocessors'"):
        Sketch.from_spec({key: value for key, value in spec.items() if key != "multiprocessors"})
    with pytest.raises(TypeError, match="multiprocessors is None"):
        Sketch.from_spec({**spec, "multiprocessors": None})


def build(path, sketch):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    data = torch.utils.data.TensorDataset(normal(10, 4), torch.arange(10) % 3)
    bank = sp.build(
        model, sp.Classification(), run, data, path, sketch=sketch, batch_size=5, storage="float32", progress=False
    )
    return bank, model, data


def test_a_bank_is_built_and_asked_like_any_other(there, tmp_path):
    """Law 2 for the inner products that TracIn's scores are, against those of an exact bank."""
    bank, model, data = build(tmp_path / "bank", jl())
    assert bank.sketch.spec()["multiprocessors"] == SMS
    exact, _, _ = build(tmp_path / "exact", Sketch(15, "identity"))
    got, expected = (sp.TracIn(one, model=model, progress=False).score(data).to_numpy() for one in (bank, exact))
    norms = torch.cat([block.rows for block in exact.stages[0].iter_rows(0)]).norm(dim=1).numpy()
    # Score (i, j) is c_j <a_i, a_j>, so that c_j |a_i| |a_j| is score (j, j) times |a_i| / |a_j|.
    sizes = np.abs(np.diagonal(expected)) * norms[:, None] / norms
    assert (np.abs(got - expected) <= 4 * (2 / DIM) ** 0.5 * sizes).mean() >= 0.99


def test_a_bank_is_refused_on_another_device(install, tmp_path, monkeypatch):
    install(stand_in())
    build(tmp_path / "bank", jl())
    install(stand_in(), 108)
    with pytest.raises(sp.BankError, match=r"cannot be made here: .*made on 132 multiprocessors: cpu has 108"):
        sp.open(tmp_path / "bank")
    with pytest.raises(sp.BankError, match=r"made on 132 multiprocessors: cpu has 108"):
        build(tmp_path / "bank", jl())  # to go on with it
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(sp.BankError, match=r"made on 132 multiprocessors: backend 'fast-jl' needs"):
        sp.open(tmp_path / "bank")


# The library itself --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_library_itself():
    """Signs only, and products with them."""
    try:
        found = fast_jl.find_fast_jl()
    except ValueError as error:
        pytest.skip(str(error))
    sketch, x = jl(), normal(40, 40)
    assert sketch.multiprocessors == found.multiprocessors
    matrix = sketch.matrix(BLOCK - 20, BLOCK + 20)
    assert torch.equal(matrix.abs(), torch.full((DIM, 40), DIM**-0.5))
    assert close(sketch(x.to(found.device), BLOCK - 20).cpu(), x.double() @ matrix.T.double(), x)

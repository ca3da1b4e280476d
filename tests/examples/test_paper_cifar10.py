import argparse
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from source_proj.gradients.owners import uncovered
from source_proj.gradients.space import ParameterSpace

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def archive(batches):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as files:
        for name, batch in batches.items():
            content = pickle.dumps(batch, protocol=3)
            # Old pickles name an old module, and must stay readable.
            content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n).astype(np.uint8)


def write_archive(folder, batches, monkeypatch):
    import cifar10

    content = archive(batches)
    (folder / "cifar-10-python.tar.gz").write_bytes(content)
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(content).hexdigest())


def small_problem(tmp_path):
    import cifar10

    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = images(3100)
    np.savez(folder / cifar10.FIRST, images=pixels, labels=labels)
    options = argparse.Namespace(data=tmp_path / "data", full=False, quick=True, device="cpu")
    return cifar10.problem(options)


def test_both_files_give_the_same_images(tmp_path, monkeypatch):
    import cifar10

    pixels, labels = images(4010)
    batch = {b"data": pixels.transpose(0, 3, 1, 2).reshape(4010, -1), b"labels": labels.tolist()}
    write_archive(tmp_path, {"data_batch_1": batch}, monkeypatch)
    from_archive = cifar10.load_cifar(tmp_path, full=False)
    np.savez(tmp_path / cifar10.FIRST, images=pixels[:4000], labels=labels[:4000])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    from_file = cifar10.load_cifar(tmp_path, full=False)
    for one, other in zip(from_archive, from_file, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    train, asked = from_file
    assert len(train[0]) == 3000
    assert len(asked[0]) == 1000
    known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    assert all(known[image.tobytes()] == label for image, label in zip(*train, strict=True))
    assert not {image.tobytes() for image in train[0]} & {image.tobytes() for image in asked[0]}


def test_foreign_archives_are_refused(tmp_path, monkeypatch):
    import cifar10

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the known archive"):
        cifar10.load_cifar(tmp_path, full=True)


class Foreign:
    def __reduce__(self):
        return os.getcwd, ()


def test_a_batch_cannot_run_code(tmp_path, monkeypatch):
    import cifar10

    write_archive(tmp_path, {"data_batch_1": {b"data": Foreign()}}, monkeypatch)
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        cifar10.load_cifar(tmp_path, full=False)


@pytest.mark.parametrize("name", ["resnet", "resnet9"])
def test_one_pass_gives_the_gradients_of_every_layer(name):
    import cifar10

    model = cifar10.resnet(8, 8, 16) if name == "resnet" else cifar10.resnet9()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert uncovered(model, ParameterSpace.from_model(model)) == {}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_recorded_run_is_what_retraining_on_everything_gives(tmp_path):
    problem = small_problem(tmp_path)
    trajectory = problem.record(3, tmp_path / "run")
    model = problem.make_model()
    model.load_state_dict(trajectory.final.load())
    margins = problem.task.measurement(model.eval(), problem.queries.tensors).detach().numpy()
    everything, half = np.arange(problem.n), np.arange(0, problem.n, 2)
    again = problem.retrain([everything, half], [3, 3])
    np.testing.assert_allclose(again[0], margins, rtol=1e-4, atol=1e-5)
    assert not np.allclose(again[1], margins, atol=1e-2)
    with torch.no_grad():
        expected = model(problem.queries.tensors[0]).argmax(1).numpy()
    np.testing.assert_array_equal(problem.predict([everything], [3])[0], expected)


def test_the_learning_rate_rises_and_falls_to_zero(tmp_path):
    problem = small_problem(tmp_path)
    rate = problem.retrain.__self__._rate
    rates = [rate(step, 200) for step in range(200)]
    top = int(np.argmax(rates))
    assert 0 < top < 60
    assert all(np.diff(rates[: top + 1]) > 0)
    assert all(np.diff(rates[top:]) < 0)
    assert 0 < rates[-1] < 0.01 * problem.retrain.__self__.lr
    assert max(rates) <= problem.retrain.__self__.lr


def test_shown_are_the_images_themselves(tmp_path):
    import cifar10

    problem = small_problem(tmp_path)
    (pixels, labels), _ = cifar10.load_cifar(tmp_path / "data" / "cifar10", full=False)
    image, label = problem.show("train", 7)
    np.testing.assert_array_equal(image, pixels[7])
    assert label == cifar10.NAMES[labels[7]]
    x, y = problem.train_sets["train"][7]
    scaled = (x.permute(1, 2, 0) * torch.tensor(cifar10.DEVIATION) + torch.tensor(cifar10.MEAN)) * 255
    np.testing.assert_allclose(scaled.numpy(), image, atol=1e-3)
    assert cifar10.NAMES[int(y)] == label

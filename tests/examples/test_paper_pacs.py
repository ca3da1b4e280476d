"""PACS: reading the archive, and its two stages in miniature."""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def data(request, tmp_path, monkeypatch):
    """An archive of a few pictures a manner and kind, each of one colour; the colours of every manner, by name.

    With a parameter "textured" a corner alone is of one colour: normalised, flat pictures would be their rounding.
    """
    import pacs

    counts = {"photo": 4, "art_painting": 4, "cartoon": 3, "sketch": 6}
    monkeypatch.setattr(pacs, "KNOWN", {manner: 7 * count for manner, count in counts.items()})
    rng, colours = np.random.default_rng(0), {}
    (tmp_path / "pacs").mkdir()
    with zipfile.ZipFile(tmp_path / "pacs" / "PACS.zip", "w") as files:
        files.writestr("kfold/", "")
        files.writestr("kfold/readme.txt", "about it")
        for manner, count in counts.items():
            for number, kind in enumerate(pacs.KINDS):
                for i in range(count):
                    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
                    buffer = io.BytesIO()
                    pixels = np.full((50, 50, 3), colour, np.uint8)
                    if getattr(request, "param", "") == "textured":
                        pixels[10:] = rng.integers(0, 256, (40, 50, 3))
                    Image.fromarray(pixels).save(buffer, "png")
                    files.writestr(f"kfold/{manner}/{kind}/pic_{i}.png", buffer.getvalue())
                    colours.setdefault(manner, []).append((colour, number))
    return tmp_path, colours


def test_pictures_come_by_manner_and_kind(data):
    import pacs

    folder, colours = data
    pictures = pacs.load_pacs(folder, side=8)
    assert list(pictures) == list(pacs.KNOWN)
    for manner, (pixels, kinds) in pictures.items():
        assert pixels.shape == (pacs.KNOWN[manner], 8, 8, 3)
        for image, kind, (colour, number) in zip(pixels, kinds, colours[manner], strict=True):
            assert np.abs(image.astype(int) - colour).max() == 0
            assert kind == number


def test_other_archives_are_refused(data, monkeypatch):
    import pacs

    folder, _ = data
    monkeypatch.setattr(pacs, "KNOWN", {**pacs.KNOWN, "photo": 3})
    with pytest.raises(ValueError, match=r"not the known PACS: it has \{'photo': 28,"):
        pacs.load_pacs(folder)
    (folder / "pacs" / "PACS.zip").write_bytes(b"<html>sign in</html>")
    with pytest.raises(ValueError, match="no zip archive, but begins with b'<html>"):
        pacs.load_pacs(folder)


@pytest.mark.parametrize("data", ["textured"], indirect=True)
def test_a_recorded_run_of_two_stages_is_what_retraining_gives(data, tmp_path):
    import pacs

    problem = pacs.problem(argparse.Namespace(data=data[0], full=False, quick=True, device="cpu"))
    assert list(problem.train_sets) == ["pictures", "sketches"]
    sketches = {tuple(colour) for colour, _ in data[1]["sketch"]}
    seen = [tuple(int(c) for c in problem.show("pictures", i)[0][0, 0]) for i in range(problem.n)]
    assert not sketches & set(seen)
    asked = [tuple(int(c) for c in problem.show("queries", i)[0][0, 0]) for i in range(len(problem.queries))]
    assert sketches >= set(asked)
    model = problem.make_model()
    model.load_state_dict(problem.record(3, tmp_path / "run").final.load())
    margins = problem.task.measurement(model.eval(), problem.queries.tensors).detach().numpy()
    everything, half = np.arange(problem.n), np.arange(0, problem.n, 2)
    again = problem.retrain([everything, half], [3, 3])
    np.testing.assert_allclose(again[0], margins, rtol=1e-3, atol=1e-3)
    assert not np.allclose(again[1], margins, atol=1e-2)

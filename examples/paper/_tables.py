"""Concrete, Pima and Parkinsons: tables of numbers, standardised."""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import _above  # noqa: F401
import numpy as np
import torch
from _data import download, write_whole
from torch.utils.data import TensorDataset

__all__ = ["concrete", "parkinsons", "pima", "split_table"]

FILES = {  # public copies of the UCI data sets, some of them within a zip, with the sum of the file
    "uci_concrete/concrete.data": (
        "https://raw.githubusercontent.com/pomonam/kronfluence/main/examples/uci/data/concrete.data",
        "11c479fc4c8c79aab632fb1f79871c3a17b5e3bce3632f4f66db97f73dce7a36",
    ),
    "pima_diabetes/pima-indians-diabetes.csv": (
        "https://raw.githubusercontent.com/jbrownlee/Datasets/master/pima-indians-diabetes.csv",
        "6bfe5d0f379d17a0e0819b996407e3c09bf80febd4287f2ed212190dfff154af",
    ),
    "uci_parkinsons/parkinsons_updrs.data": (
        "https://archive.ics.uci.edu/static/public/189/parkinsons+telemonitoring.zip",
        "f2c7d5025dec4e92e7feae367a5f7ccf58789a10ac6b54bdf15976c599f9dd39",
    ),
}


def concrete(options: argparse.Namespace) -> np.ndarray:
    """1,030 rows: eight inputs and the strength of the concrete."""
    return np.loadtxt(_file(options.data, "uci_concrete/concrete.data"), dtype=np.float64)


def pima(options: argparse.Namespace) -> np.ndarray:
    """768 rows: eight inputs and whether diabetes was found."""
    return np.loadtxt(_file(options.data, "pima_diabetes/pima-indians-diabetes.csv"), delimiter=",", dtype=np.float64)


def parkinsons(options: argparse.Namespace) -> np.ndarray:
    """5,875 recordings: age, sex, day and 16 measures of the voice, and the total UPDRS, how severe the disease is.

    Left out are the patient's number, and the motor UPDRS, which is most of the total.
    """
    rows = np.loadtxt(
        _file(options.data, "uci_parkinsons/parkinsons_updrs.data"), np.float64, delimiter=",", skiprows=1
    )
    age_sex_day, voice, total = rows[:, 1:4], rows[:, 6:], rows[:, 5:6]
    return np.hstack([age_sex_day, voice, total])


def split_table(
    rows: np.ndarray, queries: int, *, classes: bool, most: int | None = None
) -> tuple[TensorDataset, TensorDataset]:
    """Shuffle, keep the last ``queries`` rows for queries, standardise by the training rows."""
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    train, asked = rows[: len(rows) - queries][:most], rows[len(rows) - queries :]
    mean, deviation = train.mean(0), train.std(0)
    if classes:
        mean[-1], deviation[-1] = 0, 1

    def dataset(some: np.ndarray) -> TensorDataset:
        standard = torch.from_numpy((some - mean) / deviation)
        targets = standard[:, -1].long() if classes else standard[:, -1].float()
        return TensorDataset(standard[:, :-1].float(), targets)

    return dataset(train), dataset(asked)


def _file(folder: Path, name: str) -> Path:
    path, (url, known) = folder / name, FILES[name]
    if not path.exists():
        content = download(url, path)
        write_whole(path, zipfile.ZipFile(io.BytesIO(content)).read(path.name) if url.endswith(".zip") else content)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != known:
        raise ValueError(f"{path} is not the known {name}: sha256 {found}, expected {known}; delete the file")
    return path

"""Runs that several files of tests score."""

import pytest
from problems import Problem, classification, two_stages

import source_proj as sp


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> tuple[Problem, sp.Bank]:
    problem = classification()
    return problem, problem.build(tmp_path_factory.mktemp("bank") / "bank", sampled_fisher=2)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> tuple[Problem, sp.Bank]:
    problem = two_stages()
    return problem, problem.build(tmp_path_factory.mktemp("bank") / "bank")

"""What all tests of recorded runs share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing guards against power failures, which no test makes; on a busy disk it takes seconds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

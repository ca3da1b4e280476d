"""Progress as calls of the user's own function, and as nothing at all."""

from io import StringIO

import pytest

from source_proj._io.progress import progress_bar, shared_bar, tick


def test_a_callback_hears_of_every_step_and_of_what_is_done_now():
    calls = []
    with progress_bar(lambda *step: calls.append(step), "queries", 5, "queries") as bar:
        bar.update(2)
        bar.describe("queries, checkpoint 2 of 4")
        bar.update(3)
    assert calls == [("queries", 2, 5), ("queries, checkpoint 2 of 4", 5, 5)]


def test_silence_is_silent(capsys):
    with progress_bar(False, "rows", 3, "rows") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_work_within_work_counts_in_the_outer_bar_alone():
    calls = []

    def record(*step):
        calls.append(step)

    tick(7)  # nobody listens
    with shared_bar(record, "fit", 4, "rows"):
        with shared_bar(record, "inner", 2, "rows"):
            tick(1)
        tick(3)
    tick(7)
    assert calls == [("fit", 1, 4), ("fit", 4, 4)]


@pytest.mark.parametrize("widgets", [False, True])
def test_a_bar_warns_of_nothing_and_is_a_widget_where_there_are_some(widgets, monkeypatch, recwarn):
    if widgets:
        pytest.importorskip("ipywidgets")
    else:
        monkeypatch.setattr("source_proj._io.progress.find_spec", lambda name: None)
    with progress_bar(True, "rows", 3, "rows") as bar:
        bar.update(3)
    assert [str(warning.message) for warning in recwarn] == []


class Logged:
    """What many scripts put in the place of stderr: it writes, and that is all."""

    write = flush = staticmethod(lambda *_: None)


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("kind", ["written to a log", "closed", "none"])
def test_a_bar_asks_nothing_of_stderr_that_it_may_not_have(kind, progress, monkeypatch):
    closed = StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", {"written to a log": Logged(), "closed": closed, "none": None}[kind])
    with progress_bar(progress, "rows", 3, "rows") as bar:
        bar.update(3)

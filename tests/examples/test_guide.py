"""The guide's code runs, and what the guide and CONTRIBUTING name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = sorted(GUIDE.rglob("*.md"))
LINKED = [ROOT / ".github" / "CONTRIBUTING.md", *PAGES]
BLOCK = re.compile(r"^(?P<skip><!-- no-run: .+ -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:\.ci|\.github|examples|kernels|source_proj|tests)/[\w./-]*|[A-Z]+\.md)`")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def code_of(text):
    """The page's python blocks but those marked ``<!-- no-run: reason -->``, each at its own line of the page."""
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        if block["skip"] is None:
            first = text.count("\n", 0, block.start("code"))
            code = block["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


WITH_CODE = [page for page in PAGES if code_of(page.read_text(encoding="utf-8")).strip()]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code_of(page.read_text(encoding="utf-8")), encoding="utf-8")
    folder = tmp_path / "here"
    folder.mkdir()
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{name_of(page)} (line numbers are the page's):\n{done.stderr[-4000:]}"


def environment():
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search}


def test_architecture_shows_code_that_runs():
    assert GUIDE / "architecture.md" in WITH_CODE


def test_blocks_keep_their_lines_and_skipped_ones_are_left_out():
    first, skipped, last = (f"```python\n{line}\n```\n" for line in ("a = 1", "b = 2", "c = a"))
    text = f"# Page\n\n{first}\n<!-- no-run: needs a GPU -->\n{skipped}{last}"
    assert code_of(text).splitlines() == ["", "", "", "a = 1", *[""] * 7, "c = a", ""]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_paths_that_are_named_exist(page):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    places = [ROOT, page.parent, ROOT / "examples" / "paper"]
    missing = [path for path in named if not any((place / path).exists() for place in places)]
    assert not missing, f"{name_of(page)} names {missing}"


def test_every_decision_is_listed_and_says_what_a_record_must():
    listed = set(LINK.findall((GUIDE / "decisions" / "README.md").read_text(encoding="utf-8")))
    records = [page for page in (GUIDE / "decisions").glob("*.md") if page.name != "README.md"]
    assert records
    for record in records:
        assert record.name in listed
        text = record.read_text(encoding="utf-8")
        assert "**Look again**" in text, record.name
        if record.name != "refused.md":  # a list of decisions
            assert all(f"**{part}" in text for part in ("Context.", "Tried", "Decided.")), record.name

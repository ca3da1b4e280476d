"""The guide's code runs, and what the guide and CONTRIBUTING name is there."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import source_proj as sp

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = sorted(GUIDE.rglob("*.md"))
LINKED = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *PAGES]
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


RUNNER = """
import os, sys, traceback
failed = []
for page, script in zip(sys.argv[1::2], sys.argv[2::2]):
    os.makedirs(f"{script}.here")
    os.chdir(f"{script}.here")
    try:
        exec(compile(open(script, encoding="utf-8").read(), page, "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        failed.append(page)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def run(pages, folder):
    """Run the code of pages, each in a folder of its own, in one process: torch is imported once."""
    arguments = []
    for page in pages:
        script = folder / f"page_{page.stem}.py"  # a page called random is no module of that name
        script.write_text(code_of(page.read_text(encoding="utf-8")), encoding="utf-8")
        arguments += [page, script]
    command = [sys.executable, "-W", "error", "-c", RUNNER, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1800, check=False
    )


def test_code_of_the_pages_runs_from_top_to_bottom(tmp_path):
    done = run(WITH_CODE, tmp_path)
    assert done.returncode == 0, f"line numbers are the pages':\n{done.stderr[-6000:]}"


def test_a_page_that_fails_is_named_and_the_others_run(tmp_path):
    pages = [tmp_path / f"{name}.md" for name in ("first", "second", "third")]
    for page, line in zip(pages, ("1 / 0", "print('second')", "import warnings; warnings.warn('old')"), strict=True):
        page.write_text(f"# Page\n\n```python\n{line}\n```\n", encoding="utf-8")
    done = run(pages, tmp_path)
    assert done.returncode == 1
    assert done.stdout == "second\n"
    assert f"failed: {[str(pages[0]), str(pages[2])]}" in done.stderr
    assert f'File "{pages[0]}", line 4' in done.stderr


def environment():
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search}


@pytest.mark.parametrize("name", ["architecture", "first-steps", "scores", "language", "tasks", "workloads", "format"])
def test_pages_that_show_how_have_code_that_runs(name):
    assert GUIDE / f"{name}.md" in WITH_CODE


def test_blocks_keep_their_lines_and_skipped_ones_are_left_out():
    first, skipped, last = (f"```python\n{line}\n```\n" for line in ("a = 1", "b = 2", "c = a"))
    text = f"# Page\n\n{first}\n<!-- no-run: needs a GPU -->\n{skipped}{last}"
    assert code_of(text).splitlines() == ["", "", "", "a = 1", *[""] * 7, "c = a", ""]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


def slugs(page):
    """Anchors of a page's headings, as code hosts and mkdocs make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_anchors_lead_to_headings(page):
    links = re.findall(r"\[[^\]]*\]\(([^)#\s:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [(path, anchor) for path, anchor in links if anchor not in slugs((page.parent / path) if path else page)]
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


@pytest.fixture(scope="module")
def site():
    """What mkdocs is told, as a module that needs no mkdocs."""
    spec = importlib.util.spec_from_file_location("guide_site", GUIDE / "_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(site):
    pages = [page for chapter in site.navigation().values() for page in chapter]
    assert len(set(pages)) == len(pages)
    own = {path.relative_to(GUIDE).as_posix() for path in PAGES}
    made = {*site.linked_files(), *site.reference()}
    assert own <= set(pages) <= own | made
    assert all(pages for pages in site.navigation().values())


def test_every_page_can_be_reached_by_links_from_the_first(site):
    reached, coming = set(), [GUIDE / "index.md"]
    while coming:
        page = coming.pop()
        if page not in reached:
            reached.add(page)
            targets = [
                page.parent / link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link
            ]
            coming += [target.resolve() for target in targets if target.suffix == ".md"]
    assert set(PAGES) <= reached


def test_the_reference_has_every_public_name(site):
    listed = {line.removeprefix("::: ") for text in site.reference().values() for line in text.splitlines()}
    rooms = [sp, *(getattr(sp, name) for name in ("evaluate", "integrations", "report"))]
    public = [getattr(room, name) for room in rooms for name in room.__all__]
    named = [value for value in public if str(getattr(value, "__module__", "")).startswith("source_proj.")]
    named = [value for value in named if hasattr(value, "__qualname__")]
    assert len(named) > 50
    assert {f"{value.__module__}.{value.__qualname__}" for value in named} <= listed


def test_links_keep_their_targets_in_the_site(site):
    """A page's links, led to their places in the site, are those of the files that they name in the repository."""
    places = {path: page for page, path in site.linked_files().items()}
    places |= {path: path.relative_to(GUIDE).as_posix() for path in GUIDE.rglob("*") if path.is_file()}
    for page in [path for path in places if path.suffix == ".md"]:
        text = page.read_text(encoding="utf-8")
        file = types.SimpleNamespace(src_uri=places[page], abs_src_path=str(page))
        led = LINK.findall(site.on_page_markdown(text, page=types.SimpleNamespace(file=file)))
        here = [os.path.normpath(Path(file.src_uri).parent / link) for link in led if "://" not in link]
        targets = [(page.parent / link).resolve() for link in LINK.findall(text) if "://" not in link]
        expected = [path / "README.md" if path.is_dir() else path for path in targets]
        assert here == [places[path] for path in expected if path.exists()], name_of(page)


def test_roles_of_docstrings_are_taken_away(site):
    html = "<p>:class:<code>Source</code> and <code>:meth:</code> or :math:<code>x</code></p>"
    assert site.on_page_content(html) == "<p><code>Source</code> and <code>:meth:</code> or <code>x</code></p>"


def test_the_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (GUIDE / "images").iterdir()}
    assert sizes
    assert max(sizes.values()) < 150_000


def test_the_table_of_the_outside_judge_is_what_its_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(GUIDE.parent))
    judge = importlib.import_module("quanda_judge")
    page = judge.PAGE.read_text(encoding="utf-8")
    assert judge.with_table(page, judge.RESULTS) == page
    assert "| SOURCE | " in page


def test_the_readme_is_short_and_shows_a_picture_first():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 134  # half of what it once was
    assert any(line.startswith("![") for line in lines[:8])
    assert not [line for line in lines if line.startswith("| ")]  # tables are in the guide

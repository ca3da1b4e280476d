"""What mkdocs is told about the guide: the order of pages, files outside of its folder, pages of the API reference.

The site is built by ``mkdocs build --strict -f .mkdocs.yml``. Pages link to files of the repository as they lie there,
so that links work on a code host too; here each such file becomes a page of the site, or a file beside it.
"""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["linked_files", "navigation", "on_config", "on_files", "on_page_content", "on_page_markdown", "reference"]

GUIDE = Path(__file__).resolve().parent
ROOT = GUIDE.parent.parent
OUTSIDE = "repository"  # where files from outside of the guide's folder lie in the site
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s:]+)(?P<anchor>#[^)]*)?\)")
ROLE = re.compile(r":(?:class|meth|func|mod|data|attr|exc|math):(?=<code>)")

CHAPTERS = {
    "Start": ["index.md", "first-steps.md", "scores.md", "choosing.md", "random.md", "faq.md"],
    "Use": [
        "commands.md", "trainer.md", "tasks.md", "language.md", "curation.md", "capture.md", "workloads.md",
        "cluster.md", "conventions.md",
    ],
    "Measured": ["results.md", "../paper/RESULTS.md", "../paper/LABORATORY.md", "../paper/STUDIES.md"],
    "Inside": [
        "method.md", "architecture.md", "format.md", "security.md", "decisions/README.md",
        "../../.github/CONTRIBUTING.md",
    ],
}  # fmt: skip
ROOMS = ["task", "trajectory", "sketch", "gradients", "bank", "attribution", "distribute", "evaluate", "curate",
         "integrations", "report"]  # fmt: skip


def navigation() -> dict[str, list[str]]:
    """Pages of each chapter, by their places in the site; pages that no chapter names come last."""
    named = {chapter: [page for page in pages if (GUIDE / page).exists()] for chapter, pages in CHAPTERS.items()}
    known = {page for pages in named.values() for page in pages}
    others = sorted(path.relative_to(GUIDE).as_posix() for path in GUIDE.rglob("*.md"))
    more = [page for page in others if page not in known and not page.startswith("decisions/")]
    decisions = [page for page in others if page.startswith("decisions/") and page not in known]
    chapters = {chapter: [_place(GUIDE / page) for page in pages] for chapter, pages in named.items()}
    return {**chapters, "Decisions": decisions, **({"More": more} if more else {}), "Reference": list(reference())}


def reference() -> dict[str, str]:
    """Pages of the API reference, one a room: every public name, by the module that defines it."""
    package = importlib.import_module("source_proj")
    spaces = [package, *(getattr(package, room) for room in ROOMS if room in package.__all__)]
    public = [getattr(space, name) for space in spaces for name in space.__all__]
    names: dict[str, set[str]] = {}
    for value in public:
        module = str(getattr(value, "__module__", ""))
        if module.startswith("source_proj.") and hasattr(value, "__qualname__"):
            room = module.split(".")[1]
            names.setdefault(room if room in ROOMS else "errors", set()).add(f"{module}.{value.__qualname__}")
    return {
        f"reference/{room}.md": f"# {room}\n\n" + "".join(f"::: {name}\n\n" for name in sorted(names[room]))
        for room in [*ROOMS, "errors"]
        if room in names
    }


def linked_files() -> dict[str, Path]:
    """Files outside of the guide that its pages, or pages that these link to, name: by their places in the site."""
    pages, files = list(GUIDE.rglob("*.md")), {}
    while pages:
        for path in _targets(pages.pop()):
            if not path.is_relative_to(GUIDE) and path.is_file() and _place(path) not in files:
                files[_place(path)] = path
                pages += [path] * (path.suffix == ".md")
    return files


def _targets(page: Path) -> Iterator[Path]:
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        yield (page.parent / match["target"]).resolve()


def _place(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    path = path.resolve()
    if path.is_relative_to(GUIDE):
        return path.relative_to(GUIDE).as_posix()
    inner = path.relative_to(ROOT).as_posix()
    return f"{OUTSIDE}/{inner.lstrip('.')}"  # hidden folders would be left out


# What mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Set the navigation."""
    config.nav = [{chapter: pages} for chapter, pages in navigation().items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to, and the reference."""
    from mkdocs.structure.files import File

    for place, path in linked_files().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for place, text in reference().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the places that their targets have in the site."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    own = Path(page.file.abs_src_path)

    def led(match: re.Match[str]) -> str:
        path = (own.parent / match["target"]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        if path.is_dir():
            if not (path / "README.md").exists():
                return match["text"].strip("[]")
            path = path / "README.md"
        start = Path(page.file.src_uri).parent.as_posix()
        return f"{match['text']}({os.path.relpath(_place(path), start)}{match['anchor'] or ''})"

    return LINK.sub(led, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles of docstrings away, which stand before code: ``:class:`Source```."""
    return ROLE.sub("", html)

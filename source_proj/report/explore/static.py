"""The page as a folder that opens from disk, with the strongest examples of each query."""

import json
from pathlib import Path
from typing import Any, get_args

from source_proj._io.outputs import require_free, write_outputs
from source_proj.report.explore.server import PAGE_FILES, page_file
from source_proj.report.explore.state import Explorer, Kind, Sense

__all__ = ["require_writable", "write_static"]

_DATA = "data.js"
_FILES = (*PAGE_FILES, _DATA)
_SENSES: tuple[Sense, Sense] = ("helpful", "harmful")


def require_writable(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that the page cannot be written into, before any work is done for it.

    Raises:
        FileExistsError: one of its files is there, or a file in the place of the folder.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place} is a file, and the page is a folder of several: give another path")
    for name in _FILES:
        require_free(folder / name, overwrite=overwrite)


def write_static(explorer: Explorer, folder: Path, *, overwrite: bool = False) -> None:
    """Write the page and its data: all queries, and the training examples in a first page of one's lists.

    Args:
        explorer: what it shows.
        folder: where; it is made if need be.
        overwrite: replace the page's files that are there.

    Raises:
        FileExistsError: as :func:`require_writable`.
    """
    require_writable(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    content = {folder / name: page_file(name) for name in PAGE_FILES}
    content[folder / _DATA] = b"window.exploreData = " + json.dumps(_data(explorer)).encode() + b";\n"
    write_outputs(content, overwrite=overwrite)


def _data(explorer: Explorer) -> dict[str, Any]:
    facts = explorer.facts()
    train: dict[int, Any] = {}
    lists = []
    for query in range(facts["queries"]):
        of_query = {}
        for sense in _SENSES:
            hits = explorer.strongest("queries", query, sense)["hits"]
            for hit in hits:
                train[hit["example"]["place"]] = hit["example"]
            of_query[sense] = [[hit["example"]["place"], hit["score"], hit["signed"], hit["parts"]] for hit in hits]
        lists.append(of_query)
    kind: Kind = "queries"
    queries = [explorer.example(kind, place) for place in range(facts["queries"])]
    known = [train[place] for place in sorted(train)]
    return {
        "facts": {**facts, "tokens": False, "cleans": False},
        "labels": {name: explorer.labels(name) for name in get_args(Kind)},
        "queries": queries,
        "train": known,
        "lists": lists,
    }

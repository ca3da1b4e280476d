"""The page as a folder that opens from disk, with the strongest examples of each query."""

import json
from pathlib import Path
from typing import Any, get_args

from source_proj._io.outputs import require_free, write_outputs
from source_proj.report.explore.server import PAGE_FILES, page_file
from source_proj.report.explore.state import Explorer, Kind, Sense

__all__ = ["write_static"]

_SENSES: tuple[Sense, Sense] = ("helpful", "harmful")


def write_static(explorer: Explorer, folder: Path, *, overwrite: bool = False) -> None:
    """Write the page and its data: all queries, and the training examples in a first page of one's lists.

    Args:
        explorer: what it shows.
        folder: where; it is made if need be.
        overwrite: replace the page's files that are there.

    Raises:
        FileExistsError: one of them is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in [*PAGE_FILES, "data.js"]}
    for path in paths.values():
        require_free(path, overwrite=overwrite)
    content = {paths[name]: page_file(name) for name in PAGE_FILES}
    content[paths["data.js"]] = b"window.exploreData = " + json.dumps(_data(explorer)).encode() + b";\n"
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

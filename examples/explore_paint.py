"""How soon the page of ``source-proj explore`` is there: ``python examples/explore_paint.py --rows 100000``.

A bank of made-up texts is built and served, and opened in Chromium (from the path) by Playwright. Printed are the bytes
that the page loads, and seconds: the server's own work, Chromium's first paint and first contentful paint, until the
list is filled, until one row's lists of helpful and harmful examples are there, until the last row is in sight, and
until a search among all texts is answered, first with what was read until then, and at last with everything.
"""

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from playwright.sync_api import Page, sync_playwright
from torch import Tensor, nn
from torch.utils.data import Dataset

import source_proj as sp
from source_proj.report.explore import Explorer, application

PAINTS = "() => Object.fromEntries(performance.getEntriesByType('paint').map(e => [e.name, e.startTime / 1000]))"
BYTES = """() => performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))
    .map(e => e.encodedBodySize).reduce((sum, size) => sum + size)"""


class Reviews(Dataset[tuple[Tensor, Tensor]]):
    """Made-up reviews, which know their words."""

    def __init__(self, count: int, seed: int) -> None:
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        self.labels = (self.inputs[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def words(self, index: int) -> tuple[str, int]:
        """Text and label."""
        label = int(self.labels[index])
        return f"film number {index} was {('dull', 'fine')[label]}, and longer than it had to be", label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="training examples")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--dim", type=int, default=16, help="sketch dimension k")
    options = parser.parse_args()
    train_set, model = Reviews(options.rows, 0), nn.Linear(4, 2)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=100, lr=0.1)])
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.build(
            model, sp.Classification(), run, train_set, Path(folder) / "bank", sketch=sp.Sketch(options.dim),
            batch_size=4096,
        )  # fmt: skip
        bank.examples = sp.Examples(train_set, class_names=["bad", "good"])
        with timed("server's own work"):
            explorer = Explorer(sp.Source(bank, model=model), Reviews(options.queries, 1))
        with served(explorer) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            look(browser.new_page(viewport={"width": 1280, "height": 800}), address)
            browser.close()


def look(page: Page, address: str) -> None:
    with timed("list is filled"):
        page.goto(address)
        page.wait_for_selector("body[data-ready]", timeout=600_000)
    for name, seconds in page.evaluate(PAINTS).items():
        print(f"{name:>24}  {seconds:7.3f} s")
    print(f"{'loaded':>24}  {page.evaluate(BYTES):,} bytes")
    with timed("a query's lists"):
        page.click("#row-0")
        page.wait_for_selector("#detail .hit", timeout=600_000)
    with timed("the last row in sight"):
        page.click("#tab-train")
        page.locator("#rows").press("End")
        page.wait_for_selector("#rows .active .line", timeout=600_000)
    total = page.text_content("#count")
    for search, words in (("first search", "fine"), ("second search", "dull 99")):
        with timed(search):
            page.fill("#search", words)
            page.wait_for_selector(f"#count:not(:has-text('{total}'))", timeout=120_000)
            page.wait_for_selector("#rows .option .line")
        print(f"{'':>24}  {page.text_content('#count')}")
        with timed("all of it"):
            page.wait_for_selector("#count[aria-busy=false]", timeout=600_000)
        total = page.text_content("#count")
    print(f"{'rows in the document':>24}  {page.locator('#rows .option').count()}")


@contextmanager
def served(explorer: Explorer) -> Iterator[str]:
    """Serve the page on a free port of the loopback for as long as the block runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application(explorer), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:>24}  {time.perf_counter() - start:7.3f} s")


if __name__ == "__main__":
    main()

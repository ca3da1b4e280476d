"""The page in a real browser: search, click, keyboard, the tray; no error, no request to anywhere else."""

import json
import socket
import threading
import time

import pytest
from explored import make_explorer

from source_proj.report.explore import application, write_static

uvicorn = pytest.importorskip("uvicorn", reason="the extra explore is not installed")


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    return make_explorer(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def address(explorer):
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(explorer), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def folder(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "page"
    write_static(explorer, path)
    return f"file://{path}/index.html"


@pytest.fixture(params=["served", "folder"])
def page(request, browser, address, folder):
    """The page, opened; at the end nothing was said on the console, and nobody else was asked."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda sent: asked.append(sent.url))
    start = address if request.param == "served" else folder
    opened.goto(start)
    opened.wait_for_selector("body[data-ready]", timeout=20000)
    yield opened
    assert opened.evaluate("window.owned") is None
    opened.close()
    assert said == []
    own = start.removesuffix("index.html")
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []


def test_a_click_shows_whom_an_example_helped_and_back(page):
    assert page.text_content("#detail h2") == "Query 0"  # opened by itself: the page says what it is for
    assert page.locator("#detail .hit").count() > 0
    page.click("#row-2")
    page.wait_for_selector("#detail h2:has-text('Query 2')")
    assert "null" not in page.text_content("#detail")
    page.click("#detail .helpful .hit button:has-text('Open')")
    page.wait_for_selector("#detail h2:has-text('Training example')")
    assert page.locator("#detail .hit").count() > 0
    assert page.locator("#detail .timeline button").count() == 2
    page.go_back()
    page.wait_for_selector("#detail h2:has-text('Query 2')")


def test_the_keyboard_alone_searches_opens_and_chooses(page):
    page.click("#tab-train")
    page.keyboard.press("/")
    page.keyboard.type("was fine")
    page.keyboard.press("Enter")  # without waiting: the keys behind it mean the rows of these words
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.wait_for_selector("#tray-count:text-is('1')")
    assert page.get_attribute("#rows", "aria-activedescendant") == "row-1"
    assert all("fine" in line for line in page.locator("#rows .option .line:first-child").all_text_contents())
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail h2:has-text('Training example')")
    with page.expect_download() as download:
        page.click("#save-csv")
    with open(download.value.path(), encoding="utf-8") as file:
        assert file.read().startswith("id\n\"'=id")


def test_ids_leave_the_page_as_they_are(browser, tmp_path):
    """Those beyond 2**53 as well, which a browser's own numbers would round."""
    explorer = make_explorer(tmp_path, ids=[2**60 + place for place in range(48)])
    write_static(explorer, tmp_path / "page")
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page/index.html")
    page.wait_for_selector("body[data-ready]")
    page.click("#tab-train")
    page.focus("#rows")
    page.keyboard.press("Space")
    chosen = int(page.text_content("#tray li span"))
    assert chosen >= 2**60
    with page.expect_download() as download:
        page.click("#save-json")
    with open(download.value.path(), encoding="utf-8") as file:
        assert json.load(file) == [chosen]
    page.close()


def test_strange_texts_are_shown_as_text(page):
    page.click("#row-0")
    page.wait_for_selector("#detail h2")
    assert "<img src=x" in page.text_content("#detail .text")
    assert page.locator("img[src=x]").count() == 0
    assert page.get_attribute("#detail .text", "dir") == "auto"  # of any script


@pytest.mark.parametrize("width", [360, 1280, 3840])
def test_no_width_has_to_be_scrolled_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.click("#row-1")
    page.wait_for_selector("#detail h2:has-text('Query 1')")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_of_a_million_rows_only_those_in_sight_are_in_the_document(page):
    page.evaluate(
        """async () => {
            const box = document.createElement("div");
            box.id = "long";
            box.innerHTML = "<div><div></div></div>";
            box.style.cssText = "height: 500px; overflow: auto";
            document.body.append(box);
            const fetch = async (start, count) => ({ total: 1e6, examples:
                Array.from({ length: Math.min(count, 1e6 - start) }, (_, row) => ({ place: start + row })) });
            const nothing = () => {};
            window.long = new VirtualList(box, { open: nothing, choose: nothing,
                render: (option, example) => option.append(String(example.place)) });
            await window.long.reset(fetch);
            window.long.move(999999);
        }"""
    )
    page.wait_for_selector("#long :text-is('999999')")
    assert page.evaluate("window.long.window.children.length") < 20


def test_an_answer_that_comes_after_a_later_search_changes_nothing(browser, address):
    """Rows and count are of the words in the field, in whatever order a slow server answers."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    held = []
    page.route("**/api/train?*words=film*", lambda route: held.append(route))
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=20000)
    page.click("#tab-train")
    page.fill("#search", "film")
    page.keyboard.press("Enter")
    page.fill("#search", "was fine")
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows .option >> text=fine")
    # Not of the queries, whose list was here before and is of films that were fine, too.
    page.wait_for_selector("#count:has-text('training examples'):not(:has-text('48'))")
    shown = page.text_content("#rows"), page.text_content("#count")
    assert held
    with page.expect_response("**/api/train?*words=film*") as late:
        for route in held:
            route.continue_()
    late.value.finished()
    page.evaluate("new Promise((done) => setTimeout(done))")
    assert (page.text_content("#rows"), page.text_content("#count")) == shown
    page.close()


def test_a_search_that_goes_on_fills_the_list_and_moves_nothing(browser, address):
    """Answers as of a server that still reads; the list grows to the last of them, and keeps what is in sight."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    known = {"total": 30, "read": 0.25}

    def answer(route):
        if "words=slow" not in route.request.url:
            route.continue_()
            return
        asked = dict(part.split("=") for part in route.request.url.partition("?")[2].split("&"))
        places = range(int(asked["start"]), min(int(asked["start"]) + int(asked["count"]), known["total"]))
        examples = [{"place": place, "id": place, "word": str(place), "text": f"text {place}"} for place in places]
        route.fulfill(json={**known, "examples": examples})

    page.route("**/api/train?*", answer)
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=20000)
    page.click("#tab-train")
    page.fill("#search", "slow")
    page.wait_for_selector("#count:has-text('30 training examples so far, 25 % searched')")
    page.evaluate("document.getElementById('rows').scrollTop = 740")
    page.wait_for_selector("#rows :text-is('text 10')")
    known.update(total=250, read=1)
    page.wait_for_selector("#count[aria-busy=false]:has-text('250 training examples')")
    assert page.evaluate("document.getElementById('rows').scrollTop") == 740
    page.locator("#rows").press("End")
    page.wait_for_selector("#rows :text-is('text 249')")
    page.locator("#rows").press("Home")
    for _ in range(35):
        page.locator("#rows").press("ArrowDown")
    page.wait_for_selector("#rows .active :text-is('text 35')")
    page.close()

"""A server for each page (bundled, newest) and a tab for each rendering (canvas, Vue).

Opening ComfyUI's page takes longer than most tests, so the next test goes on in the tab of the last one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from likeness.toolbox.server import environment_from_variables

from .. import live
from .page import Page, chromium

READY = "LikenessTrainEmbedding"
TEMPLATES = "test_templates_are_found_by_the_words_of_the_readme_and_listed_with_thumbnails"
FAILED = pytest.StashKey[bool]()
OF_GRAPHS = (
    "test_graphs_open_and_keep_their_values",
    "test_graph_runs_with_live_loss",
    "test_sampling_in_stages_shows_how_far_it_is",
    "test_blueprint_is_listed_dropped_and_runs",
)
EVERYWHERE = ("-HiPer]", "-9 Lab - HiPer - train and edit]")
USUAL = (("bundled", "canvas"), ("newest", "vue"))  # how each page renders by itself


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Graphs with every node of the pack open in the newest page with Vue, and one of each kind runs there; one of
    HiPer's does both in all four. Dialogs open in canvas, and all else is looked at where a page renders as it does by
    itself. The rest is slow.
    """
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        given = item.callspec.params if hasattr(item, "callspec") else {}
        rendering = given.get("server"), given.get("page")
        if item.originalname == TEMPLATES:  # a dialog that Vue draws in each rendering of the nodes
            fast = "canvas" in rendering
        elif item.originalname in OF_GRAPHS:
            fast = rendering == ("newest", "vue") or item.name.endswith(EVERYWHERE)
        else:
            fast = rendering in USUAL
        if not fast:
            item.add_marker("slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    yield
    if call.excinfo:
        item.stash[FAILED] = True


@pytest.fixture(scope="session")
def browser():
    with chromium(environment_from_variables().chromium) as running:
        yield running


@pytest.fixture(scope="session", params=["bundled", "newest"])
def server(request, tmp_path_factory):
    frontend = environment_from_variables().newest_frontend if request.param == "newest" else None
    if request.param == "newest" and frontend is None:
        pytest.fail("LIKENESS_FRONTEND is not set: run the tests with `python3 toolbox/test.py`.")
    with live.start(tmp_path_factory.mktemp(request.param), frontend) as running:
        assert not running.import_failures(), running.log()
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()


@pytest.fixture(scope="session")
def tabs(server):
    """The server's open pages by their rendering."""
    opened: dict[str, Page] = {}
    yield opened
    for page in opened.values():
        page.close()


@pytest.fixture(params=["canvas", "vue"])
def page(request, server, browser, tabs):
    opened = tabs.pop(request.param, None) or Page(browser, server.url, READY, vue=request.param == "vue")
    opened.problems.clear()
    yield opened
    shots = os.environ.get("LIKENESS_SCREENSHOTS")
    if shots:
        name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
        opened.tab.screenshot(path=os.path.join(shots, f"{name}.png"))
    if request.node.stash.get(FAILED, False):
        opened.close()
    else:
        tabs[request.param] = opened
    assert not opened.problems

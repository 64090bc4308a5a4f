"""One server for the whole tier; after each test its queue must be empty."""

from __future__ import annotations

import pytest

from .. import live
from .results import Results


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with live.start(tmp_path_factory.mktemp("comfyui")) as running:
        assert not running.import_failures(), running.log()
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()


@pytest.fixture(scope="session")
def results(server):
    """All shipped graphs, each run once."""
    return Results(server)


@pytest.fixture
def training(server, object_info):
    return live.Training(server, object_info)


@pytest.fixture(autouse=True)
def nothing_left_in_the_queue(server):
    yield
    try:
        server.wait_idle(timeout=10)
    except TimeoutError:
        server.post("/queue", {"clear": True})
        server.interrupt()
        server.wait_idle()
        raise

"""Bad input is refused by ComfyUI's own executor in this process; tests/server sends a sample of it over HTTP."""

from __future__ import annotations

import pytest

from .. import live
from ..executor import executor


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with executor(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@pytest.fixture
def training(server, object_info):
    return live.Training(server, object_info)

"""What the registry hands out: the tracked files without those of .comfyignore, as ComfyUI's only pack."""

from __future__ import annotations

import subprocess
import zipfile

import pytest

from likeness.toolbox.server import Server, environment_from_variables
from likeness.toyworld import workflows

from .. import live
from .test_interface import NODES
from .test_start_graphs import BLUEPRINTS

LARGEST = 3_000_000  # bytes
NAME = "likeness"  # of the folder, as the Manager unpacks it


def tracked(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(command, cwd=workflows.ROOT, check=True, capture_output=True, text=True).stdout
    return set(filter(None, listed.split("\0")))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")):
            packed.write(workflows.ROOT / name, name)
    return path


def test_archive_is_small(archive):
    assert archive.stat().st_size < LARGEST


def test_archive_is_all_that_a_user_needs(archive, tmp_path):
    pack = tmp_path / "base" / "custom_nodes" / NAME
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(pack)
    with Server(environment_from_variables(), tmp_path / "base", {}) as server:
        assert not server.import_failures(), server.log()
        listed = server.object_info()
        assert tuple(sorted(name for name in listed if name.startswith("Likeness"))) == NODES
        assert {listed[name]["python_module"] for name in NODES} == {f"custom_nodes.{NAME}"}
        assert tuple(sorted(server.get("/api/workflow_templates")[NAME])) == live.NAMES
        served = {entry["name"] for entry in server.get("/global_subgraphs").values()}
        assert served >= {path.stem for path in BLUEPRINTS}
        assert set(server.get("/i18n")["zh"]["nodeDefs"]) >= set(NODES)
        assert f"/extensions/{NAME}/js/likeness.js" in server.get("/extensions")
        assert all(server.get_bytes(f"/extensions/{NAME}/docs/{name}.md") for name in NODES)

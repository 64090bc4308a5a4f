"""Store the graphs of a release as test data: `python toolbox/freeze.py` copies those that changed since the last one.

Run it once, after raising the version in pyproject.toml. Graphs saved with a release must open and run in all later
ones, so a frozen graph never changes; tests/data/graphs/index.json lists its releases and its hash.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FROZEN_GRAPHS = Path("tests") / "data" / "graphs"


def version(root: Path = ROOT) -> str:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]


def title(name: str) -> str:
    """The name of a graph without the release that it was frozen with."""
    return re.sub(r"\.\d+\.\d+\.\d+$", "", name)


def freeze(root: Path = ROOT) -> list[str]:
    """Freeze the graphs of this version; returns the names of the added files."""
    index_path, release, added = root / FROZEN_GRAPHS / "index.json", version(root), []
    index: dict[str, dict[str, Any]] = json.loads(index_path.read_text(encoding="utf-8"))
    if any(release in entry["releases"] for entry in index.values()):
        raise SystemExit(f"The graphs of {release} are kept already: raise the version in pyproject.toml first.")
    for path in sorted((root / "workflows").glob("*.json")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        same = [name for name, entry in index.items() if entry["sha256"] == digest]
        name = same[0] if same else f"{path.stem}.{release}"
        if not same:
            (root / FROZEN_GRAPHS / f"{name}.json").write_bytes(path.read_bytes())
            added.append(name)
        index.setdefault(name, {"sha256": digest, "releases": []})["releases"].append(release)
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(index.items())]
    index_path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return added


if __name__ == "__main__":
    added = freeze()
    sys.stdout.write("".join(f"{name}\n" for name in added) or "No graph is new.\n")

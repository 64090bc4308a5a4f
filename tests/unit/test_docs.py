"""Every relative link of the documentation leads to a file and a heading, and every named graph exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
SINGLE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "toyworld/README.md")
PAGES = [*(ROOT / name for name in SINGLE), *sorted((ROOT / "docs").rglob("*.md"))]
HELP = sorted((ROOT / "web" / "docs").glob("*.md"))
GRAPHS = {path.stem for path in (ROOT / "workflows").glob("*.json")}

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def links(page: Path) -> list[str]:
    """All targets of links and images, without code; of HTML tags too."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [markdown or html for markdown, html in LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings: lower case, no punctuation, hyphens, numbered repeats."""
    result: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = re.sub(r"\]\([^)]*\)", "]", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (f"{slug}-{number}" if number else slug) in result:
            number += 1
        result.add(f"{slug}-{number}" if number else slug)
    return result


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    missing = []
    for link in links(page):
        if EXTERNAL.match(link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(ROOT)  # a link that leaves the repository works on one machine only
        line = target.suffix == ".py" and re.fullmatch(r"L\d+", anchor)  # tests/unit/test_methods_pages.py looks at it
        heading = not anchor or line or (target.suffix == ".md" and target.is_file() and anchor in anchors(target))
        if not (inside and target.exists() and heading):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_point_at_files_and_headings(page: Path) -> None:
    assert broken(page) == []


def test_readme_stays_a_first_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_list_of_graphs_names_every_graph_once() -> None:
    listed = re.findall(
        r"\]\(\.\./workflows/([^)]+)\.json\)", (ROOT / "docs" / "workflows.md").read_text(encoding="utf-8")
    )
    assert sorted(map(unquote, listed)) == sorted(GRAPHS)


RATES = {"SINE": ("effect_sine", "wide_sine"), "SISO": ("effect_siso", "effect_siso_turbo", "edit_siso")}
"""Section -> the stored results behind its figures."""


def rate_of(result: str) -> str:
    stored = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text(encoding="utf-8"))
    return f"learning rate {stored['settings']['learning_rate']}"


@pytest.mark.parametrize("section", RATES)
def test_a_learning_rate_of_the_toyworld_stands_beside_its_figures(section: str) -> None:
    """They are higher than the published ones, so that figures without them mislead."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    own = results.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert all(rate_of(result) in own for result in RATES[section])
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in first.splitlines() if line.startswith(f"| {section}") and "identity" in line)
    result = "effect_siso_turbo" if section == "SISO" else "effect_sine"
    number = rate_of(result).rpartition(" ")[2]
    assert "learning rate" in row and number in row


def test_patches_are_called_equal_only_as_far_as_they_are() -> None:
    """The boxes are the reference code's; tests/parity/test_sine_training_parity.py holds the pixels to two levels."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "The boxes of its patches are equal; their pixels differ by 0.41 of 255 on average and 1.66 at most" in text
    assert not any("patches exactly" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", HELP, ids=lambda page: page.stem)
def test_help_page_names_graphs_that_hold_its_node(page: Path) -> None:
    line = page.read_text(encoding="utf-8").split("\n\n")[1]
    named = re.findall(r"`(9 Lab - [^`]+)`", line)
    assert line.startswith("Graph") and named
    for name in named:
        nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        assert f'"{page.stem}"' in json.dumps(nodes), f"{name} has no {page.stem}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[a](b.md)", ["b.md"]),
        ('![](x.png) and [t](y.md#z "title")', ["x.png", "y.md#z"]),
        ('<img src="i.jpg">', ["i.jpg"]),
        ("```\n[a](b.md)\n```\n`[c](d.md)`", []),
    ],
)
def test_links_are_found_outside_of_code(tmp_path: Path, text: str, expected: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert links(page) == expected


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `code`, and [link](x.md)!\n## Same\n## Same\n```\n# not one\n```\n")
    assert anchors(page) == {"a-code-and-link", "same", "same-1"}

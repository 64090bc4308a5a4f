"""Every shipped graph in the page: opens, keeps its values, converts as our converter does, and runs."""

from __future__ import annotations

import re

import pytest

from likeness.toolbox.graph import PAGE_WIDGETS, all_nodes, convert, named_values
from likeness.toyworld import workflows

from .. import graph_checks, live


def family_of(name: str) -> str:
    """The method that a graph shows; start graphs are one family."""
    return name.split(" - ")[1] if name.startswith("9 Lab") else "Start"


def node_types(*names: str) -> set[str]:
    """Of this pack, in graphs and in the nodes folded in them."""
    found = {node["type"] for name in names for node in all_nodes(workflows.shipped(name))}
    return {each for each in found if each.startswith("Likeness")}


def with_every_type(names: tuple[str, ...], seen: set[str]) -> tuple[str, ...]:
    """The start graphs, which hold folded nodes, and of the others those with most types that none before has."""
    chosen = [name for name in names if family_of(name) == "Start"]
    while missing := node_types(*names) - seen - node_types(*chosen):
        chosen.append(max(names, key=lambda name: len(node_types(name) & missing)))
    return tuple(chosen)


HIPER = ("9 Lab - HiPer - train and edit",)
OTHERS = with_every_type(tuple(name for name in live.NAMES if name not in HIPER), node_types(*HIPER))
REST = tuple(name for name in live.NAMES if name not in HIPER + OTHERS)
SIDECARS = {name: workflows.sidecar(name).get("browser") for name in live.NAMES}
STAGED = "9 Lab - EZIGen - generate"  # has no loss to draw
RUNS = {name: entry for name, entry in SIDECARS.items() if entry and name != STAGED}  # the trainings run in the page
# Their trainings run in the server tests.
LONG = (
    "9 Lab - EZIGen - with HiPer and SINE",
    "9 Lab - EZIGen - train adapter",
    "9 Lab - HiFi Tuner - train subject",
)


def values(graph, object_info) -> dict[str, dict]:
    """The widget values of all nodes that the server knows."""
    return {str(node["id"]): named_values(node, object_info) for node in graph["nodes"] if node["type"] in object_info}


def plain(prompt) -> dict:
    """Types and inputs, without what the page sends of its own for the nodes that show a text."""
    return {
        name: (
            node["class_type"],
            {
                key: value
                for key, value in node["inputs"].items()
                if node["class_type"] not in PAGE_WIDGETS or key == "source"
            },
        )
        for name, node in prompt.items()
    }


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(HIPER, id="HiPer"),
        pytest.param(OTHERS, id="others"),
        pytest.param(REST, id="rest", marks=pytest.mark.slow),
    ],
)
def test_graphs_open_and_keep_their_values(page, object_info, names):
    page.setting("Comfy.Workflow.ShowMissingModelsWarning", False)  # SD1.5 is not there, the page would offer it
    for name in names:
        graph = workflows.shipped(name)
        page.load(graph, name)
        assert not page.unknown_nodes(), name
        assert not [text for text in page.complaints() if "node" in text.lower()]  # the newest page also lists models
        saved = page.saved()
        assert values(saved, object_info) == values(graph, object_info), name
        assert len(saved["links"]) == len(graph["links"]), name
        assert plain(page.prompt()) == plain(convert(graph, object_info)) == plain(convert(saved, object_info)), name


def test_graph_that_is_changed_and_saved_in_the_page_can_be_shipped(request, page, object_info):
    """Open, move a node, change a prompt, save: the file still passes every check of a shipped graph."""
    name, title, prompt = "9 Lab - HiPer - train and edit", "Source prompt", "a photo of a cup on a table"
    page.setting("Comfy.Workflow.ShowMissingModelsWarning", False)
    graph = workflows.shipped(name)
    page.load(graph, name)
    page.tab.evaluate(
        """([id, text]) => { const node = app.graph._nodes.find(node => String(node.id) === id);
          node.pos = [node.pos[0], node.pos[1] + 4]; node.widgets[0].value = text; app.graph.change(); }""",
        [workflows.node_id(graph, title), prompt],
    )
    saved = page.saved()
    changed = next(node for node in saved["nodes"] if node.get("title") == title)
    before = next(node for node in graph["nodes"] if node.get("title") == title)
    wrong = graph_checks.complaints(name, saved, object_info)
    moved = changed["pos"][1] - before["pos"][1]
    expected = 4.0
    if request.node.callspec.params == {"server": "bundled", "page": "vue"} and moved < 0:
        # ComfyUI 0.3.75's page moves every node up by its title bar when it switches to Vue: nothing else may be wrong.
        expected = -float(graph_checks.TITLE_BAR)
        wrong = [sentence for sentence in wrong if "lies on" not in sentence and "cuts" not in sentence]
    assert changed["widgets_values"][0] == prompt
    assert moved == pytest.approx(expected, abs=0.01)
    assert not wrong


def test_missing_model_is_offered(page):
    page.load(workflows.shipped("9 Lab - HiPer - train and edit"), "missing")
    page.tab.get_by_text("v1-5-pruned-emaonly-fp16.safetensors").first.wait_for(state="visible")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in RUNS])
def test_graph_runs_with_live_loss(page, object_info, server, name):
    graph = live.lowered(name, object_info)
    title, steps, shown = (RUNS[name][key] for key in ("runs", "steps", "shows"))
    trainer = workflows.node_id(graph, title)
    seed = 7000 + len(
        list((server.base / "output").rglob("*.png"))
    )  # another one each time: nothing comes from a cache
    patience = {(title, "patience"): 0} if family_of(name) == "SISO" else {}  # all its images, whatever they are like
    graph = workflows.adapt(graph, {(title, "seed"): seed, **patience}, object_info)
    page.load(graph, "run")
    curve = page.tab.locator(".likeness-loss").first
    assert curve.get_attribute("data-points") == "0"
    page.tab.evaluate(
        """id => { window.likenessSeen = []; app.api.addEventListener('likeness.progress', ({ detail }) =>
          String(detail.node) === id && requestAnimationFrame(() => window.likenessSeen.push(
            Number(document.querySelector('.likeness-loss').dataset.step)))); }""",
        trainer,
    )
    page.tab.evaluate(
        """id => { window.likenessPreviews = 0; for (const kind of ['b_preview', 'b_preview_with_metadata'])
          app.api.addEventListener(kind, () => { window.likenessPreviews += 1; }); }""",
        trainer,
    )
    assert page.run() == "execution_success"
    assert not page.complaints()

    seen = page.tab.evaluate("() => window.likenessSeen")
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == steps
    assert curve.get_attribute("data-points") == str(steps)
    for line in (curve.locator("polyline").first, curve.locator("polyline").last):  # the losses and their running mean
        assert len(line.get_attribute("points").split()) == steps
    assert f"step {steps} / {steps}" in curve.inner_text()
    box = curve.bounding_box()
    assert box and box["width"] > 100 and box["height"] > 50
    assert page.tab.evaluate("() => window.likenessPreviews") > 0
    assert page.shows_picture(trainer), "ComfyUI does not show the preview on the node"
    for title in shown:
        assert page.shows_picture(workflows.node_id(graph, title)), f"no image in {title}"
    saved = next(node for node in page.saved()["nodes"] if str(node["id"]) == trainer)
    assert named_values(saved, object_info)["seed"] == seed, "the curve must not be saved with the values"


def test_sampling_in_stages_shows_how_far_it_is(page, object_info, server):
    graph = live.lowered(STAGED, object_info)
    title, whole, shown = (SIDECARS[STAGED][key] for key in ("runs", "steps", "shows"))
    seed = 9000 + len(list((server.base / "output").rglob("*.png")))
    graph = workflows.adapt(graph, {(title, "seed"): seed}, object_info)
    sampler = workflows.node_id(graph, title)
    page.load(graph, "run")
    page.tab.evaluate(
        """id => { window.likenessSeen = []; window.likenessPreviews = 0;
          for (const kind of ['b_preview', 'b_preview_with_metadata'])
            app.api.addEventListener(kind, () => { window.likenessPreviews += 1; });
          app.api.addEventListener('progress_state', ({ detail }) => { const state = detail.nodes[id];
            if (state) window.likenessSeen.push([state.value, state.max]); }); }""",
        sampler,
    )
    assert page.run() == "execution_success"
    assert not page.complaints()
    seen = page.tab.evaluate("() => window.likenessSeen")
    assert [whole, whole] in seen and len({value for value, _ in seen}) > 3
    assert page.tab.evaluate("() => window.likenessPreviews") > 0
    for title in shown:
        assert page.shows_picture(workflows.node_id(graph, title)), f"no image in {title}"


def test_templates_are_found_by_the_words_of_the_readme_and_listed_with_thumbnails(page):
    from playwright.sync_api import TimeoutError as Waited

    readme = (workflows.ROOT / "README.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"search for \*([^*]+)\* and choose the first card", readme)
    page.tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    search = page.tab.locator("[role=dialog] input:visible").first
    search.fill(words)
    page.tab.wait_for_function(
        """name => { const cards = [...document.querySelectorAll('[data-testid^="template-workflow-"]')];
          return cards.length && cards.length < 5 && cards[0].dataset.testid.endsWith(name); }""",
        arg=next(name for name in live.NAMES if graph_checks.START.match(name)),
    )
    page.tab.locator("[role=dialog]").get_by_text(live.PACK, exact=True).first.click()
    search.fill("")
    cards = page.tab.locator('[data-testid^="template-workflow-"]')
    cards.first.wait_for()
    for _ in range(30):  # the list grows while one scrolls down
        if cards.count() >= len(live.NAMES):
            break
        cards.last.hover()
        page.tab.mouse.wheel(0, 2000)
        page.tab.wait_for_timeout(300)
    for name in live.NAMES[::15]:  # images are loaded slowly, and every graph has one by a test of the files
        card = page.tab.locator(f'[data-testid="template-workflow-{name}"]')
        card.wait_for()
        for tries_left in reversed(range(4)):  # images are loaded when they come into view; the page may miss it once
            card.scroll_into_view_if_needed()
            try:
                page.tab.wait_for_function(
                    """name => { const image = document.querySelector(`[data-testid="template-workflow-${name}"] img`);
                      return image && image.naturalWidth > 0 && !image.src.includes('default-template'); }""",
                    arg=name,
                    timeout=30_000,
                )
                break
            except Waited:
                if not tries_left:
                    raise
                cards.first.scroll_into_view_if_needed()
    page.tab.locator(f'[data-testid="template-workflow-{live.NAMES[-1]}"]').click()
    own = {node["type"] for node in workflows.shipped(live.NAMES[-1])["nodes"] if node["type"].startswith("Likeness")}
    page.tab.wait_for_function(
        "types => types.every(type => app.graph._nodes.some(node => node.type === type))", arg=sorted(own)
    )

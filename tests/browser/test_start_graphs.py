"""A newcomer's first steps in the page: a blueprint from the node library, and a start graph as an app."""

from __future__ import annotations

import pytest

from likeness.toolbox.graph import Graph, adapt, convert, subgraphs
from likeness.toyworld import workflows

from .. import graph_checks, live

BLUEPRINT = "Put my subject into a new picture (HiPer)"
START = next(name for name in live.NAMES if graph_checks.START.match(name))
TEXTS = {"What the photo shows": "a photo of a dog on the grass", "New picture": "a photo of a dog in the sea"}
SMALL = {"Learning steps": live.STEPS, "Size": workflows.SIZE}
LIBRARY = "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')"
AS_AN_APP = "() => app.extensionManager.command.execute('Comfy.ToggleLinear')"
PLACED = "title => app.graph._nodes.some(node => node.title === title)"
# The nodes around the blueprint, connected by hand; its widgets are set by the words that people see.
COMPLETE = """([title, loader, checkpoint, picture, values]) => {
  const host = app.graph._nodes.find(node => node.title === title);
  const add = (type, widgets) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    for (const [name, value] of Object.entries(widgets)) node.widgets.find(each => each.name === name).value = value;
    return node;
  };
  const link = (node, output, input) => node.connect(output, host, host.inputs.findIndex(each => each.name === input));
  const model = add(loader, { ckpt_name: checkpoint });
  ['model', 'clip', 'vae'].forEach((input, output) => link(model, output, input));
  link(add('LoadImage', { image: picture }), 0, 'image');
  const save = add('SaveImage', {});
  host.connect(0, save, 0);
  const labels = host.inputs.filter(each => each.widget).map(each => each.label);
  for (const [label, value] of Object.entries(values)) host.widgets[labels.indexOf(label)].value = value;
  app.graph.change();
  return String(save.id);
}"""

# What the folded node shows of the training inside, half a second after each of its reports.
WATCH = """title => {
  const host = app.graph._nodes.find(node => node.title === title);
  window.likenessFolded = [];
  app.api.addEventListener('likeness.progress', () => setTimeout(() => {
    const curve = host.widgets.find(each => each.name === 'loss_curve')?.element;
    window.likenessFolded.push([curve?.textContent ?? '', curve?.querySelector('img').naturalWidth ?? 0]);
  }, 500));
}"""
WIDGETS = "title => app.graph._nodes.find(node => node.title === title).widgets.map(each => each.name)"


def with_small_values(graph: Graph) -> Graph:
    """The graph with few steps and small pictures in its folded node."""
    (host,) = [node for node in graph["nodes"] if node["type"] in subgraphs(graph)]
    labels = [entry["label"] for entry in host["inputs"] if "widget" in entry]
    for label, value in SMALL.items():
        host["widgets_values"][labels.index(label)] = value
    return graph


def test_blueprint_is_listed_dropped_and_runs(request, page, object_info):
    page.tab.evaluate("() => app.graph.clear()")
    page.tab.evaluate(LIBRARY)
    search = page.tab.locator("input[placeholder*='earch']:visible").first
    search.fill("into a new picture")
    page.tab.get_by_text(BLUEPRINT).first.click()
    page.tab.wait_for_timeout(1_000)
    if not page.tab.evaluate(PLACED, BLUEPRINT):  # newer pages hang the node to the pointer
        page.tab.mouse.click(900, 300)
    page.tab.wait_for_function(PLACED, arg=BLUEPRINT)
    values = {**TEXTS, **SMALL}
    values["What the photo shows"] += f", {request.node.callspec.params['page']}"  # a training of its own
    around = [BLUEPRINT, workflows.NARROW_LOADER, workflows.CHECKPOINT, workflows.PICTURE, values]
    save = page.tab.evaluate(COMPLETE, around)
    prompt = page.prompt()
    nodes = {(node.get("_meta") or {}).get("title"): node["inputs"] for node in prompt.values()}
    assert nodes["Learn the subject"]["steps"] == live.STEPS and nodes["Size"]["value"] == workflows.SIZE
    assert nodes["The new picture's words"]["text"] == TEXTS["New picture"]
    assert {name: node["inputs"] for name, node in convert(page.saved(), object_info).items()} == {
        name: node["inputs"] for name, node in prompt.items()
    }
    page.tab.evaluate(WATCH, BLUEPRINT)
    assert page.run() == "execution_success"
    assert not page.complaints()
    assert page.shows_picture(save)
    text, width = page.tab.evaluate("() => window.likenessFolded").pop()
    assert f"step {live.STEPS} / {live.STEPS}" in text
    itself = request.node.callspec.params != {
        "server": "newest",
        "page": "canvas",
    }  # the page shows the image by itself
    assert (width > 0) != itself
    assert "loss_curve" not in page.tab.evaluate(WIDGETS, BLUEPRINT), "it goes when the run is over"
    page.tab.evaluate(LIBRARY)


@pytest.mark.parametrize("server", ["newest"], indirect=True)
@pytest.mark.parametrize("page", ["vue"], indirect=True)
def test_start_graph_is_an_app(page, object_info):
    """Photo, what it shows, what is wanted, Run: the picture is there, and progress on the way."""
    settings = {("Model", "ckpt_name"): workflows.CHECKPOINT, ("Your photo", "image"): workflows.PICTURE}
    settings |= {(title, "value"): text for title, text in TEXTS.items()}
    graph = with_small_values(adapt(workflows.shipped(START), settings, object_info))
    page.load(workflows.narrowed(graph), START)
    page.tab.evaluate(AS_AN_APP)
    tour = page.tab.get_by_role("button", name="Skip")  # the page introduces apps at first
    if tour.count():
        tour.first.click()
    for label in ("Your photo", *TEXTS):
        page.tab.get_by_text(label, exact=True).locator("visible=true").first.wait_for()
    page.tab.evaluate(
        """() => { window.likenessEnd = null; window.likenessPreviews = 0;
          for (const kind of ['execution_success', 'execution_error'])
            app.api.addEventListener(kind, () => { window.likenessEnd = kind; });
          for (const kind of ['b_preview', 'b_preview_with_metadata'])
            app.api.addEventListener(kind, () => { window.likenessPreviews += 1; }); }"""
    )
    page.tab.get_by_role("button", name="Run", exact=True).locator("visible=true").last.click()
    page.tab.wait_for_function("() => window.likenessEnd", timeout=600_000)
    assert page.tab.evaluate("() => [window.likenessEnd, window.likenessPreviews > 0]") == ["execution_success", True]
    page.tab.wait_for_function(
        "() => [...document.images].some(image => image.src.includes('new_picture') && image.naturalWidth > 0)"
    )
    page.tab.evaluate(AS_AN_APP)


def test_warning_of_the_pack_is_a_message_of_the_page(page):
    """Once, also when a node warns for each item of a list."""
    text = "The training prompt is empty."
    warn = "text => app.api.dispatchEvent(new CustomEvent('likeness.warning', { detail: { text } }))"
    page.tab.evaluate(warn, text)
    message = page.tab.get_by_text(text)
    message.locator("visible=true").first.wait_for()
    page.tab.wait_for_timeout(500)
    once = message.count()
    page.tab.evaluate(warn, text)
    page.tab.wait_for_timeout(500)
    assert message.count() == once

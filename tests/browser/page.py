"""Drives ComfyUI's page in a real Chromium, in canvas and in Vue rendering, old pages and new ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from likeness.toolbox.graph import Graph

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# What the page itself complains about on a server without network, and the newest page on an older server.
KNOWN_NOISE = (
    r"api\.comfy\.org",
    r"huggingface\.co",
    r"Content Security Policy",
    r"Error fetching file size",  # of a model that the page offers to download
    r"user\.css",
    r"/api/userdata",
    r"/api/jobs",
    r"Jobs ?API",
    r"Failed to fetch queue",
    r"ComfyApp graph accessed before initialization",  # page 1.49.6 of ComfyUI 0.33 says so without any pack too
    r"index_logo\.json",
    r"the server responded with a status of 404",  # repeats the answer that is recorded with its address
    r"Cannot read properties of undefined \(reading 'id'\)[\s\S]*Proxy\.set",
)
PATIENCE = 120_000  # milliseconds
SETTLE = 1_000  # milliseconds; the page loads its start-up graph after it says that it is ready
SHORTLY = 400  # milliseconds; for what the page draws after a setting or a graph has been taken
FINISHED = ("execution_success", "execution_error", "execution_interrupted")
COMPLAINTS = "[role=dialog], .p-toast-message-error, [data-testid=error-overlay]"
NODE = "app.graph._nodes.find(node => String(node.id) === id)"  # in the page, where `id` is known
RUN_BUTTON = "[data-testid=queue-button] button.p-splitbutton-button, button[data-testid=queue-button]"


@contextmanager
def chromium(executable: Path | None) -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    if executable is None:
        raise RuntimeError("No Chromium is known: start this through toolbox/test.py, which finds or installs one.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(executable), headless=True, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """One open page. `problems` collects errors of the console and refused requests."""

    def __init__(self, browser: Any, url: str, node_type: str, vue: bool) -> None:
        self._context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.tab = self._context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.tab.on("console", lambda message: message.type == "error" and self._note(message.text))
        self.tab.on("pageerror", lambda error: self._note(str(error)))
        self.tab.on("response", lambda answer: answer.status >= 400 and self._note(f"{answer.status} {answer.url}"))
        self.tab.goto(url, wait_until="domcontentloaded")
        ready = "type => window.app?.vueAppReady && window.LiteGraph?.registered_node_types?.[type]"
        self.tab.wait_for_function(ready, arg=node_type)
        self.tab.wait_for_timeout(SETTLE)
        self.setting("Comfy.VueNodes.Enabled", vue)

    def close(self) -> None:
        self._context.close()

    def _note(self, text: str) -> None:
        if not any(re.search(pattern, text) for pattern in KNOWN_NOISE):
            self.problems.append(text[:500])

    def setting(self, name: str, value: Any) -> None:
        self.tab.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
        self.tab.wait_for_timeout(SHORTLY)

    def load(self, graph: Graph, name: str) -> None:
        """Open a graph as the page's own file loading does."""
        self.tab.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
        self.tab.wait_for_timeout(SHORTLY)

    def saved(self) -> Graph:
        """What the page would save now."""
        return json.loads(self.tab.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What the page would send to the server now."""
        return json.loads(self.tab.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def unknown_nodes(self) -> list[str]:
        return self.tab.evaluate(
            "() => app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
        )

    def complaints(self) -> list[str]:
        """Texts of open dialogs and error messages."""
        return self.tab.evaluate(
            """kinds => [...document.querySelectorAll(kinds)]
              .filter(element => element.getClientRects().length).map(element => element.innerText.slice(0, 400))""",
            COMPLAINTS,
        )

    def run(self) -> str:
        """Press Run and wait for the end; returns how it ended."""
        self.tab.evaluate(
            """kinds => { window.likenessEnd = null;
              for (const kind of kinds) app.api.addEventListener(kind, () => { window.likenessEnd = kind; }); }""",
            list(FINISHED),
        )
        self.tab.locator(RUN_BUTTON).first.click()
        self.tab.wait_for_function("() => window.likenessEnd", timeout=10 * PATIENCE)
        self.tab.wait_for_timeout(SETTLE)
        return self.tab.evaluate("() => window.likenessEnd")

    def shows_picture(self, node_id: str, timeout: float = 20_000) -> bool:
        """Bring a node into view; whether it then shows a decoded image, in either rendering."""
        from playwright.sync_api import TimeoutError as Waited

        self.tab.evaluate(f"id => app.canvas.centerOnNode({NODE})", node_id)
        try:
            self.tab.wait_for_function(
                f"""id => {{ const element = document.querySelector(`[data-node-id="${{id}}"]`);
                  return [...({NODE}.imgs ?? []), ...(element?.querySelectorAll('img') ?? [])]
                    .some(image => image.naturalWidth > 0); }}""",
                arg=node_id,
                timeout=timeout,
            )
        except Waited:
            return False
        return True

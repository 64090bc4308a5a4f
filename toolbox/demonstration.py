"""The demonstration that demo.py starts: the shipped HiPer graph in the toyworld, in a real ComfyUI."""

import argparse
import os
import signal
import time
from pathlib import Path

from ..toyworld import workflows
from .environment import SANDBOX
from .graph import Graph, convert
from .server import PromptRun, Server, environment_from_variables

BASE = SANDBOX / "demo"
NAME = "9 Lab - HiPer - train and edit"
IMAGES = {
    "Reconstruction": "source prompt with the subject",
    "Edit without the subject": "edit prompt alone",
    "Edit with the subject": "edit prompt with the subject, from the same noise",
    "Scores": "both edits with their scores",
}


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


class Narrator:
    """Prints the training's progress every few seconds."""

    _last = 0.0

    def __call__(self, event: dict) -> None:
        if event["type"] == "likeness.progress" and time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            data = event["data"]
            say(f"step {data['step']} of {data['steps']}, loss {data['loss']:.4f}")


def report(graph: Graph, run: PromptRun, source: Path) -> None:
    """Print the paths of the images, and the scores."""
    say(f"ran in {run.seconds:.0f} s; the images:")
    say(f"  source: {source}")
    for title, meaning in IMAGES.items():
        for entry in run.outputs[workflows.node_id(graph, title)]["images"]:
            say(f"  {title.lower()} ({meaning}): {BASE / 'output' / entry['subfolder'] / entry['filename']}")
    say("scores, first the edit without and then the edit with the subject:")
    for text in run.outputs[workflows.node_id(graph, "Score")]["text"]:
        for line in text.splitlines():
            say(f"  {line}")


def end_with(server: Server) -> None:
    """A terminal that is closed ends ComfyUI too, which would go on and hold the port. An exception would not do: one
    that is raised in an import or a destructor can be lost.
    """

    def end(number: int, _frame: object) -> None:
        server.stop()
        os._exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)


def main(arguments: list[str]) -> int:
    """Run the graph, print the paths of the results and how to open the graph in the browser."""
    parser = argparse.ArgumentParser(prog="demo.py", description=main.__doc__)
    parser.add_argument("--serve", action="store_true", help="keep the server running, for the browser")
    parser.add_argument("--port", type=int, default=None, help="port of the server (default: a free one)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of toyworld/graphs)")
    options = parser.parse_args(arguments)
    environment = environment_from_variables()
    server = Server(environment, BASE, workflows.NODE_FOLDERS, workflows.MODELS, port=options.port)
    end_with(server)
    source = workflows.draw_subject(BASE / "input")
    with server:
        if server.import_failures():
            raise SystemExit(server.log()[-4000:])
        say(f"ComfyUI runs at {server.url}")
        object_info = server.object_info()
        steps = {"steps": options.steps, "save_every": max(1, options.steps // 10)} if options.steps else {}
        more = {("LikenessTrainEmbedding", widget): value for widget, value in steps.items()}
        graph = workflows.in_small_world(NAME, object_info, more=more)
        stored = workflows.store_graph(graph, BASE, f"small_world_{NAME}")
        run = server.run(convert(graph, object_info), timeout=3600, on_event=Narrator())
        report(graph, run, source)
        if options.serve:
            say(f"open {server.url}, press w and choose {stored.stem}; Ctrl+C here ends the server")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                return 0
    say("to open the same graph in the browser: python3 toolbox/demo.py --serve --port 8188")
    say(f"then open http://127.0.0.1:8188, press w and choose {stored.stem}")
    return 0

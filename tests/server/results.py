"""Finished runs of shipped graphs, and what is asked of their pictures."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from likeness.toolbox import small_world
from likeness.toolbox.graph import active_nodes, convert

from .. import live, tiny_sana

SWEPT = {("LikenessSweep", "base_weights"): "0.3, 0.7", ("LikenessSweep", "end_percents"): "0.6, 0.8"}
TINY_FLUX = {(title, "kind"): small_world.TINY_FLUX for title in ("Model", "Text encoders", "Autoencoder")}
UNWANTED = ("Traceback", "ERROR", "WARNING", "Warning", "deprecated", "lora key not loaded")
# A stock loader says of a file that was tuned on patches what it does not know.
SAID = "lora key not loaded: likeness.needs_position_map"


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


class Result:
    """A finished run of a shipped graph."""

    def __init__(self, server, graph, run, log: str) -> None:
        self._server, self.graph, self.run, self.log = server, graph, run, log

    def pictures(self, title: str) -> list[np.ndarray]:
        return [pixels(image) for image in self._server.images(self.run, small_world.node_id(self.graph, title))]

    def text(self, title: str) -> str:
        return "\n".join(self.run.outputs[small_world.node_id(self.graph, title)]["text"])


def check_pictures(pictures: list[np.ndarray], apart: float = 0.002) -> None:
    """Neither black nor flat, nor the subject's picture itself, nor each other (mean distance of the pixels)."""
    for index, picture in enumerate(pictures):
        assert picture.shape == (small_world.SIZE, small_world.SIZE, 3)
        assert picture.std() > 0.03
        assert all(distance(picture, other) > apart for other in pictures[:index])


def run_graph(server, name: str, settings: dict[tuple[str, str], Any] | None = None) -> Result:
    """Run a shipped graph with few steps; every node that shows or saves something must have run."""
    before = len(server.log())
    object_info = server.object_info()  # anew: the choices now include what was saved
    graph = live.lowered(name, object_info, settings=settings)
    run = server.run(convert(graph, object_info))
    outputs = {str(node["id"]) for node in active_nodes(graph) if object_info[node["type"]].get("output_node")}
    assert set(run.outputs) == outputs, "a part of the graph did not run"
    return Result(server, graph, run, server.log()[before:])


def run_all(server) -> dict[str, Result]:
    """All shipped graphs, those that save something before those that load it."""
    server.post("/free", {"free_memory": True})
    time.sleep(1.0)  # what other tests have run must not be served from the cache: its events are looked at
    done = {
        name: run_graph(server, name)
        for name in ("hiper_train_and_edit", "hiper_load_and_reuse", "hiper_pick_the_step")
    }
    done["sine_edit"] = run_graph(server, "sine_edit")
    saved = done["sine_edit"].text("Save the tuned model").splitlines()[0]
    edit = small_world.texts()["Prompt of the edit"]
    loaded = {("Saved model", "name"): saved, ("Edit 1", "text"): edit}
    done["sine_load_and_edit"] = run_graph(server, "sine_load_and_edit", loaded)
    done["sine_edit_wide"] = run_graph(server, "sine_edit_wide")
    saved = done["sine_edit_wide"].text("Save the tuned model").splitlines()[0]
    done["sine_stock_loader"] = run_graph(server, "sine_stock_loader", {("Saved model", "lora_name"): saved})
    done["sine_sweep"] = run_graph(server, "sine_sweep", SWEPT)
    for name in ("style_transfer", "style_generation", "remove_content", "faces"):
        done[f"sine_{name}"] = run_graph(server, f"sine_{name}")
    for name in ("invert_and_reconstruct", "invert_and_edit", "hifi_train_subject", "hifi_ablation"):
        done[name] = run_graph(server, name)
    saved = done["hifi_train_subject"].text("Save the subject").splitlines()[0]
    for name in ("hifi_reference_guided", "hifi_replace_subject"):
        done[name] = run_graph(server, name, {("Saved subject", "name"): saved})
    for name in ("siso_generate", "siso_sdxl_turbo", "siso_references", "siso_edit_sdxl_turbo", "siso_edit_sd_turbo"):
        done[name] = run_graph(server, name)
    done["siso_flux"] = run_graph(server, "siso_flux", TINY_FLUX)
    saved = done["siso_generate"].text("Save the LoRA").splitlines()[0]
    done["siso_reuse"] = run_graph(server, "siso_reuse", {("Saved LoRA", "lora_name"): saved})
    done["siso_sana"] = run_graph(server, "siso_sana", tiny_sana.in_server(server))
    return done

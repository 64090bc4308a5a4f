"""Stored runs of the likeness optimisation: which settings go on with one, which are served from it, what it holds."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from safetensors import safe_open

from .methods import run_node
from .test_contract import forget_runs, own_user_folder, stored  # noqa: F401  (a fixture)
from .test_likeness_optimisation import Setting, equal, optimised, same, setting_of, vision  # noqa: F401  (a fixture)

STILL = {"rate": 1e-9, "steps": 1}  # no image is better than the first by 3 %


@pytest.fixture
def served(monkeypatch):
    """From the call on, nothing may be optimised."""
    from likeness.core.session.session import Session

    return lambda: monkeypatch.setattr(Session, "run", None)


def test_another_patience_goes_on_with_what_is_there(vision, monkeypatch, tmp_path):  # noqa: F811
    from likeness.core.siso.siso import Siso

    short = optimised(setting_of(), vision, **STILL, patience=2, iterations=5)
    assert len(short.losses) == 3
    update, made = Siso.update, []
    with monkeypatch.context() as patched:
        patched.setattr(Siso, "update", lambda self: made.append(self.step) or update(self))
        longer = optimised(setting_of(), vision, **STILL, patience=0, iterations=5)
    assert made == [3, 4] and torch.equal(longer.images[:3], short.images)
    forget_runs(tmp_path)
    assert equal(longer, optimised(setting_of(), vision, **STILL, patience=0, iterations=5)), (
        "as if it never had stopped"
    )


def test_what_would_have_ended_by_now_is_served(vision, served):  # noqa: F811
    found = optimised(setting_of(), vision, **STILL, iterations=4)
    served()
    assert equal(found, optimised(setting_of(), vision, **STILL, patience=2, iterations=20))
    with pytest.raises(TypeError):  # it would go on
        optimised(setting_of(), vision, **STILL, patience=9, iterations=20)


def test_both_loras_are_there(vision, served, tmp_path):  # noqa: F811
    def with_seed(seed: int, **more):
        return optimised(setting_of(), vision, seed=seed, rate=0.2, iterations=4, steps=1, **more)

    # The last bits of a loss depend on the number of threads: take a seed whose best image is not the last one.
    seed = next(seed for seed in range(10) if (run := with_seed(seed, keep="last")).best < len(run.losses) - 1)
    last = with_seed(seed, keep="last")
    forget_runs(tmp_path)
    best = with_seed(seed)
    served()
    again = with_seed(seed, keep="last")
    assert same(again.lora, last.lora) and not same(again.lora, best.lora)
    assert again.lora.header["settings"]["keep"] == "last"


def test_a_negative_prompt_that_is_not_used_changes_no_run(vision, served):  # noqa: F811
    found = optimised(setting_of(), vision, iterations=3, steps=1)
    served()
    without = Setting()
    without.empty = None
    assert equal(found, optimised(without, vision, iterations=3, steps=1))
    other = Setting()
    other.empty = other.source
    with pytest.raises(TypeError):
        optimised(other, vision, iterations=3, steps=1, cfg=2.0)


def test_pictures_are_stored_once_and_the_store_has_room_for_them(vision, tmp_path, monkeypatch, served):  # noqa: F811
    from likeness.core.session import stores as module

    stores, make = [], module.RunStore
    monkeypatch.setattr(module, "LIMIT_BYTES", 0)
    monkeypatch.setattr(module, "RunStore", lambda *given: stores.append(make(*given)) or stores[-1])
    optimised(setting_of(), vision, iterations=2, steps=1)
    found = optimised(setting_of(), vision, iterations=4, steps=1)
    (path,) = stored(tmp_path)
    with safe_open(path, "pt") as file:
        assert [name for name in file.keys() if "pictures" in name] == ["fit.pictures"]  # noqa: SIM118
    assert stores[-1].limit_bytes >= path.stat().st_size > stores[-1].limit_bytes / 4
    served()
    again = optimised(setting_of(), vision, iterations=2, steps=1)
    assert equal(found, again) and torch.equal(found.images, again.images) and found.parts == again.parts


def test_of_the_last_lora_it_is_not_said_that_it_changes_nothing(vision, caplog, monkeypatch):  # noqa: F811
    from likeness.core.siso.host import similarity
    from likeness.core.siso.siso import similarity_loss

    rising = itertools.count()
    monkeypatch.setattr(similarity, "similarity_loss", lambda *features: similarity_loss(*features) + next(rising))
    with caplog.at_level(logging.WARNING, "likeness"):
        found = optimised(setting_of(), vision, iterations=3, steps=1, keep="last")
    assert found.best == 0 and "more like the subject than the first: try another learning rate" in found.report()
    assert "changes nothing" not in found.report() + caplog.text


def test_one_iteration_can_be_plotted(vision):  # noqa: F811
    from comfy_extras.nodes_train import LossGraphNode

    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    from .test_similarity_nodes import inputs_of

    setting = Setting()
    alike = run_node(LikenessSimilarity, vision=vision, image=setting.image, weight=1.0)[0]
    *_, loss, _ = run_node(LikenessOptimizeLora, **{**inputs_of(setting, alike), "iterations": 1})
    assert LossGraphNode.execute(loss, "loss") is not None
    assert loss["loss"][0] < loss["loss"][1] == pytest.approx(loss["loss"][0], abs=1e-4)


def test_the_seconds_of_a_run_are_known_while_it_was_made_at_once(vision):  # noqa: F811
    """One that went on later has none, rather than those of its first part."""
    from likeness.core.session import job

    job._seconds.clear()
    optimised(setting_of(), vision, **STILL, patience=0, iterations=2)
    (key,) = job._seconds
    optimised(setting_of(), vision, **STILL, patience=0, iterations=2)
    assert list(job._seconds) == [key], "served"
    optimised(setting_of(), vision, **STILL, patience=0, iterations=3)
    assert not job._seconds

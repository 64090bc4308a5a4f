"""The benchmark of start costs measures a first run up to its first update, and the same run served."""

from __future__ import annotations

import pytest


@pytest.fixture
def bench(monkeypatch, tmp_path):
    import folder_paths

    from likeness.benchmarks import sizes, start_cost

    small = sizes.families(tiny=True)
    monkeypatch.setattr(sizes, "families", lambda tiny: small)
    folder_paths.set_user_directory(str(tmp_path / "user"))
    return start_cost.Bench("SD1.5")


def test_a_node_is_measured_until_its_first_update_and_then_served(bench, monkeypatch):
    import comfy.model_management as mm

    from likeness.benchmarks import start_cost
    from likeness.core.session import job

    trained, train, load, watch = [], job.train, mm.load_models_gpu, start_cost.Watch()
    monkeypatch.setattr(job, "train", lambda *a, **more: trained.append(a[1]) or train(*a, **more))
    counted = job.train
    with watch.watching():
        name, run = next(bench.nodes())
        found = start_cost.measured(run, watch)
    assert name == "Train Subject Embedding" and trained == [2]
    assert found["start"] == pytest.approx(found["ComfyUI's loading"] + found["beside it"])
    assert found["start"] > found["queued again"] > 0 and found["ComfyUI's loading"] > 0
    assert job.train is counted and mm.load_models_gpu is load


def test_weights_of_the_bench_are_views_of_one_buffer(bench):
    from likeness.benchmarks import sizes

    values = list(bench.model.model.diffusion_model.parameters())
    largest = max(value.nbytes for value in values)
    assert {value.untyped_storage().data_ptr() for value in values} == {values[0].untyped_storage().data_ptr()}
    assert values[0].untyped_storage().nbytes() == largest and all(value.is_inference() for value in values)
    family = sizes.families(tiny=True)["SD1.5"]
    assert 2 * bench.weights == sizes.weight_bytes(family, sizes.PRECISIONS["bf16"])

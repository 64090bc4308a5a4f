"""The benchmark beside core's trainer and plain loops compares equal work: it is run at its smallest size."""

from __future__ import annotations

import pytest
import torch

SMALLEST = {"channels": 32, "side": 8, "layers": 1, "rank": 4, "siso_rank": 2, "rounds": 1}
SAME = 1e-4


@pytest.fixture(scope="module")
def networks():
    from likeness.benchmarks import peers

    return peers.Networks(peers.Settings(**SMALLEST))


def test_networks_and_losses_are_the_same_on_both_sides(networks, monkeypatch):
    from likeness.benchmarks import peers

    ours, plain, found = peers.Ours(networks), peers.Plain(networks), {}

    def drawn() -> tuple[int, torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        noise = torch.randn_like(networks.x0)
        return 0, torch.randint(0, 1000, (1,)), noise

    def measure(fit) -> None:
        monkeypatch.setattr(fit, "draw", drawn, raising=False)
        fit.update()
        found[type(fit).__name__] = fit.losses[0]

    ours.hiper(measure)
    ours.null_text(measure)
    torch.manual_seed(3)
    assert float(plain.hiper()()) == pytest.approx(found["HiPer"], rel=SAME)
    assert float(plain.null_text()()) == pytest.approx(found["NullText"], rel=SAME)
    assert networks.apart() < SAME


def test_core_can_be_held_to_the_layers_of_the_pack(networks):
    from likeness.benchmarks import peers

    model, keys = networks.model(), ["diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"]
    clone = peers.held_to(model, keys)
    for key in (*keys, "diffusion_model.out.0.bias"):
        clone.clone().add_weight_wrapper(key, torch.nn.Identity())
    assert list(clone.weight_wrapper_patches) == keys and not model.weight_wrapper_patches


def test_a_row_has_time_and_memory_of_both(networks):
    from likeness.benchmarks import peers

    ours, plain = peers.Ours(networks), peers.Plain(networks)
    own, equal = (peers.beside_core(networks, ours, equal, False) for equal in (False, True))
    siso = peers.beside_plain(ours.siso, plain.siso(), 1)
    for values in (own, equal, siso):
        assert min(values.values()) > 0
        assert values["ratio"] == pytest.approx(values["ours"] / values["theirs"])
        assert values["memory ratio"] == pytest.approx(values["memory"] / values["their memory"])
    assert own["memory ratio"] < equal["memory ratio"] < 1  # core builds whole weights, of all layers where it may


def test_gates_are_on_every_row():
    from likeness.benchmarks import peers

    good, bad = {"ratio": 0.9, "memory ratio": 1.0}, {"ratio": 0.8, "memory ratio": 1.2}
    found = {"the same network": {"apart": 0.0}, "core": good, "plain": good, "other": bad}
    missed = [name for name, held in peers.gates(found).items() if not held]
    assert missed == ["core: time", "other: memory"]

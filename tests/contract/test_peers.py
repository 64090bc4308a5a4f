"""The benchmark beside core's trainer and plain loops compares equal work: it is run at its smallest size."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_a_row_is_ours_over_theirs():
    """With steps whose work is known: ours fills twice as many numbers as theirs."""
    from likeness.benchmarks import peers

    values = peers.row({"ours": 1.0, "bare": 4.0, "ratio": 0.25}, 6, 3)
    assert (values["ours"], values["theirs"], values["ratio"]) == (1.0, 4.0, 0.25)
    assert (values["memory"], values["their memory"], values["memory ratio"]) == (6, 3, 2.0)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    fit = SimpleNamespace(update=lambda: torch.zeros(1 << 21).sum(), optimizer=optimizer)
    found = peers.beside_plain(lambda measure: measure(fit), lambda: torch.zeros(1 << 20).sum(), 3)
    assert found["memory ratio"] == pytest.approx(2.0, rel=0.1) and min(found.values()) > 0


def test_core_and_ours_take_turns():
    from likeness.benchmarks import peers

    made = []
    turns = peers.Turns(lambda: made.append("ours"), 4)
    for _ in turns(8):
        made.append("theirs")
    assert made == ["theirs", "ours", "ours", "theirs"] * 3 + ["theirs"] * 2
    assert {name: len(times) for name, times in turns.times.items()} == {"ours": 6, "bare": 6}
    turns.times = {"ours": [9.0, 9.0, 1.0, 2.0, 3.0], "bare": [9.0, 9.0, 4.0, 4.0, 4.0]}
    assert turns.medians() == {"ours": 2.0, "bare": 4.0, "ratio": 0.5}


@pytest.mark.slow
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

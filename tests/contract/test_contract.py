"""What every trained thing of the pack promises, asked of each method on each family it supports."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

import pytest
import torch

from likeness.core.session import job

from .methods import METHODS, PROMISES, STEPS, Entry
from .neighbours import area, control_net, freeu, hook_lora, pag, rescale_cfg
from .setting import Setting as AnySetting
from .setting import SharedSetting as Setting
from .setting import run_node
from .setting import sample as sample_steps

sample = functools.partial(sample_steps, steps=1)


def that_have(*promises: str) -> list[Entry]:
    """The methods to which these of PROMISES apply."""
    assert set(promises) <= PROMISES
    return [entry for entry in METHODS if not entry.without & set(promises)]


def first(entries: list[Entry], *marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Each method on its first family: what does not depend on the network. marks: for those whose result is applied
    by the node of another, as the same kind of thing.
    """
    alike = ("hifi", "step-wise")
    cases = [
        pytest.param(entry, entry.families[0], id=entry.name, marks=marks if entry.name in alike else ())
        for entry in entries
    ]
    return pytest.mark.parametrize(("entry", "family"), cases)


def all_families(
    entries: list[Entry], *marks: pytest.MarkDecorator, usual: tuple[str, ...] = ()
) -> pytest.MarkDecorator:
    """Each method on all of its families; marks: for those beyond the first, and for methods that are not `usual`."""
    cases = [
        pytest.param(
            entry,
            family,
            id=f"{entry.name}-{family}",
            marks=marks if number or usual and entry.name not in usual else (),
        )
        for entry in entries
        for number, family in enumerate(entry.families)
    ]
    return pytest.mark.parametrize(("entry", "family"), cases)


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt."""


@pytest.fixture(autouse=True)
def own_user_folder(tmp_path):
    """Every test starts without stored runs."""
    import folder_paths

    folder_paths.set_user_directory(str(tmp_path / "user"))


_fitted: dict[tuple[str, str, int], tuple] = {}


def fitted(entry: Entry, family: str, steps: int = STEPS) -> tuple:
    """The artifact and the losses of a training as it is, made once for all tests that only look at it, and without
    the runs that one of them has stored.
    """
    import folder_paths

    if (entry.name, family, steps) not in _fitted:
        before = folder_paths.get_user_directory()
        with tempfile.TemporaryDirectory() as folder:
            folder_paths.set_user_directory(folder)
            _fitted[entry.name, family, steps] = entry.fit(Setting(family), steps=steps)
        folder_paths.set_user_directory(before)
    return _fitted[entry.name, family, steps]


@functools.cache
def base_picture(family: str, neighbour: Callable | None = None) -> torch.Tensor:
    """What the model makes without anything of ours, beside another node or alone."""
    setting = Setting(family)
    given = neighbour(setting, setting.model, setting.target) if neighbour else (setting.model, setting.target)
    return sample(*given, setting.empty, setting.latent)


_pictures: dict[str, torch.Tensor] = {}


def picture_of(entry: Entry, family: str) -> torch.Tensor:
    """What the method alone makes at full strength, on its first family."""
    if entry.name not in _pictures:
        setting = Setting(family)
        _pictures[entry.name] = sample(*entry.apply(setting, fitted(entry, family)[0], 1.0), setting.latent)
    return _pictures[entry.name]


def forget_runs(tmp_path) -> None:
    for path in stored(tmp_path):
        path.unlink()


def stored(tmp_path) -> list:
    """The files of stored runs, large and small."""
    return list((tmp_path / "user" / "likeness").glob("*/*.safetensors"))


def equal(entry: Entry, a, b) -> bool:
    a, b = entry.tensors(a), entry.tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@all_families(that_have("strength"))
def test_strength_zero_equals_base_and_strength_one_does_not(entry, family):
    setting, plain = Setting(family), base_picture(family)
    artifact, _ = fitted(entry, family) if family == entry.families[0] else entry.fit(setting, steps=2)
    off = sample(*entry.apply(setting, artifact, 0.0), setting.latent)
    full = sample(*entry.apply(setting, artifact, 1.0), setting.latent)
    assert torch.equal(plain, off)
    assert float((full - plain).abs().mean()) > 1e-4


@all_families(METHODS, pytest.mark.slow)
def test_the_model_gives_the_same_bits_after_training(entry, family):
    setting = AnySetting(family)
    weights = {name: value for name, value in setting.model.model.named_parameters()}
    before = sample(setting.model, setting.target, setting.empty, setting.latent)
    options = repr(setting.model.model_options)
    entry.fit(setting)
    assert torch.equal(before, sample(setting.model, setting.target, setting.empty, setting.latent))
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())
    assert repr(setting.model.model_options) == options
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in setting.model.model.modules())


@all_families(that_have("falls"), pytest.mark.slow, usual=("hiper", "sine", "null-text"))
def test_the_loss_falls(entry, family):
    """Against the same draws without learning: timestep and noise alone move the loss more than training does."""
    idle, learning = (entry.fit(Setting(family), steps=12, learning_rate=rate)[1] for rate in (1e-7, entry.rate))
    assert idle[0] == learning[0]
    won = [after < before for before, after in zip(idle[-6:], learning[-6:], strict=True)]
    assert sum(learning[-6:]) < sum(idle[-6:]) and sum(won) >= 5


@first([entry for entry in METHODS if entry.save])
def test_save_and_load_give_the_same_artifact(entry, family, tmp_path):
    setting = Setting(family)
    artifact, _ = fitted(entry, family)
    loaded = entry.load(entry.save(artifact, tmp_path))
    assert equal(entry, artifact, loaded)
    if entry.check_base:
        entry.check_base(setting, loaded)
    first, second = (sample(*entry.apply(setting, each, 1.0), setting.latent) for each in (artifact, loaded))
    assert torch.equal(first, second)


@first([entry for entry in METHODS if entry.check_base])
def test_another_family_is_refused_and_other_weights_only_warn(entry, family, caplog):
    artifact, _ = fitted(entry, family)
    for other in [name for name in entry.families if name != family]:
        with pytest.raises(ValueError, match="another model family|connect the model"):
            entry.check_base(Setting(other), artifact)
    assert "other weights" not in caplog.text
    entry.check_base(Setting(family, model_seed=1), artifact)
    assert "other weights of the same family" in caplog.text


@first(METHODS)
def test_same_seed_same_bytes_other_seed_other_bytes(entry, family, tmp_path):
    state = torch.get_rng_state()
    one, losses = fitted(entry, family)
    forget_runs(tmp_path)
    same, again = entry.fit(Setting(family))
    assert equal(entry, one, same) and losses == again
    if "seed" not in entry.without:
        assert not equal(entry, fitted(entry, family, 1)[0], entry.fit(Setting(family), steps=1, seed=1)[0])
    assert torch.equal(state, torch.get_rng_state())


@first(METHODS)
def test_cancel_keeps_the_work_and_resuming_is_exact(entry, family, tmp_path, monkeypatch):
    from likeness.core.session.progress import Progress

    whole, losses = fitted(entry, family)
    forget_runs(tmp_path)
    update, seen = Progress.update, []

    def cancel(self, losses, *shown, **more):
        if len(losses) == 1 and (shown or more):
            raise Cancelled
        seen.append(len(losses))
        update(self, losses, *shown, **more)

    monkeypatch.setattr(Progress, "update", cancel)
    with pytest.raises(Cancelled):
        entry.fit(Setting(family))
    monkeypatch.setattr(Progress, "update", lambda self, losses, *_shown, **_more: seen.append(len(losses)))
    seen.clear()
    resumed, again = entry.fit(Setting(family))
    assert seen[0] == 2, "the first update was made again"
    assert equal(entry, whole, resumed) and losses == again


@first(METHODS)
def test_an_interrupt_inside_the_model_leaves_no_trace(entry, family, tmp_path, monkeypatch):
    """In the second update, wherever the method evaluates the model; the first one is not made again."""
    from likeness.core.session.progress import Progress

    whole, losses = fitted(entry, family)
    forget_runs(tmp_path)
    setting, done, armed = Setting(family), [], True
    network, update = type(setting.model.model.diffusion_model), Progress.update
    forward = network.forward

    def cancelled(self, *args, **more):
        if armed and len(done) == 1:
            raise Cancelled
        return forward(self, *args, **more)

    def noted(self, *args, **more):
        done.append(1)
        return update(self, *args, **more)

    monkeypatch.setattr(network, "forward", cancelled)
    monkeypatch.setattr(Progress, "update", noted)
    with pytest.raises(Cancelled):
        entry.fit(setting)
    armed = False
    done.clear()
    resumed, again = entry.fit(Setting(family))
    assert len(done) == STEPS - 1, "the finished update was made again"
    assert equal(entry, whole, resumed) and losses == again


@first(that_have("prompt", "patches"))
def test_what_lies_on_the_model_or_in_the_prompt_makes_another_run(entry, family, monkeypatch):
    """A stored run must never be served for another ControlNet, another LoRA strength or another patch setting."""
    from comfy_extras.nodes_model_advanced import RescaleCFG

    keys = []

    def note(_job, _done, _store, key, _progress):
        keys.append(key)
        raise Cancelled

    def key_of(setting) -> str:
        with monkeypatch.context() as patch, pytest.raises(Cancelled):
            patch.setattr(job, "_train", note)
            entry.fit(setting, steps=1)
        return keys.pop()

    def lora(strength):
        setting = Setting(family)
        key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
        setting.model = setting.model.clone()
        ones = torch.ones(setting.model.model.state_dict()[key].shape)
        setting.model.add_patches({key: ("diff", (ones,))}, strength)
        return setting

    def controlled(strength):
        setting = Setting(family)
        _, setting.source = control_net(setting, setting.model, setting.source)
        setting.source[0][1]["control"].strength = strength
        return setting

    def rescaled(multiplier):
        setting = Setting(family)
        setting.model = run_node(RescaleCFG, model=setting.model, multiplier=multiplier)[0]
        return setting

    cases = [(lora, 0.1), (lora, 0.2), (controlled, 0.5), (controlled, 1.0), (rescaled, 0.3), (rescaled, 0.7)]
    found = [key_of(make(amount)) for make, amount in cases]
    assert len(set(found)) == len(cases), [make.__name__ for make, _ in cases]
    assert key_of(lora(0.1)) == found[0], "the same LoRA again is another run"
    trained = controlled(1.0)
    entry.fit(trained, steps=1)
    monkeypatch.setattr(job, "_train", lambda *_: pytest.fail("trained again"))
    entry.fit(trained, steps=1)
    entry.fit(controlled(1.0), steps=1)


@first(METHODS)
def test_a_finished_run_is_not_trained_again(entry, family, monkeypatch):
    whole, losses = entry.fit(Setting(family), steps=2)
    shorter, fewer = entry.fit(Setting(family), steps=1)

    def refuse(*_args, **_kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(job, "train", refuse)
    for steps, result, its_losses in ((2, whole, losses), (1, shorter, fewer)):
        second, again = entry.fit(Setting(family), steps=steps)
        assert equal(entry, result, second) and its_losses == again
    with pytest.raises(AssertionError, match="trained again"):
        entry.fit(Setting(family), steps=3)


@first(that_have("lengths"))
def test_fewer_steps_than_were_done(entry, family, tmp_path, caplog):
    direct, _ = entry.fit(Setting(family), steps=2)
    forget_runs(tmp_path)
    longer, losses = entry.fit(Setting(family), steps=3)
    shorter, fewer = entry.fit(Setting(family), steps=2)
    assert equal(entry, shorter, longer if entry.longer_instead else direct)
    assert not equal(entry, direct, longer)
    assert fewer == losses[: 3 if entry.longer_instead else 2]
    assert ("2 steps were asked for" in caplog.text) == (entry.longer_instead and entry.says_so)


@first(METHODS)
def test_an_error_in_the_middle_leaves_the_model_as_it_was(entry, family, monkeypatch):
    from likeness.core.session.progress import Progress

    setting = AnySetting(family)
    before = sample(setting.model, setting.target, setting.empty, setting.latent)

    def fail(*_args, **_more):
        raise OSError("disk full")

    monkeypatch.setattr(Progress, "update", fail)
    with pytest.raises(OSError, match="disk full"):
        entry.fit(setting)
    assert torch.equal(before, sample(setting.model, setting.target, setting.empty, setting.latent))
    assert all(value.is_inference() for value in setting.model.model.parameters())


@first(that_have("mask"))
def test_masks_decide_what_is_learned(entry, family):
    def trained(mask):
        return entry.fit(Setting(family), mask=mask)[0]

    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    full, _ = fitted(entry, family)
    assert not equal(entry, full, trained(left))
    white = trained(torch.ones(1, 64, 64))
    assert equal(entry, white, trained(torch.ones(64, 64)))
    everything = entry.tensors(white)
    for name, value in entry.tensors(full).items():
        torch.testing.assert_close(value, everything[name], atol=2e-3, rtol=0)


@first(that_have("mask"))
def test_what_lies_outside_a_mask_is_not_in_the_loss(entry, family):
    """The mean error of the whole image is then that of its parts, each weighed by its share."""
    part = torch.zeros(1, 64, 64)
    part[..., :16] = 1

    def first_loss(mask) -> float:
        return entry.fit(Setting(family), mask=mask, steps=1, **entry.whole)[1][0]

    inside, outside = first_loss(part), first_loss(1 - part)
    assert inside != pytest.approx(outside, rel=1e-2)
    assert first_loss(None) == pytest.approx(inside / 4 + 3 * outside / 4, rel=1e-5)


@all_families(that_have("batches"), pytest.mark.slow)
def test_batches_and_odd_sizes(entry, family):
    setting = Setting(family, images=3, size=(9, 7))
    artifact, losses = entry.fit(setting)
    assert len(losses) == STEPS
    latent = {"samples": torch.zeros(2, setting.channels, 7, 10)}
    both = sample(*entry.apply(setting, artifact, 1.0), latent)
    assert both.shape == latent["samples"].shape and bool(torch.isfinite(both).all())


# Beside other nodes of ComfyUI
# ------------------------------------------------------------------------------------------


NEIGHBOURS = [freeu, pag, rescale_cfg, area, control_net, hook_lora]


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda node: node.__name__)
@first(that_have("strength"), pytest.mark.slow)
def test_works_beside_other_nodes(entry, family, neighbour):
    """The neighbour still has its effect, ours too, and switched off ours leaves the neighbour's result bit for bit."""
    setting = Setting(family)
    artifact, _ = fitted(entry, family)

    def picture(model, positive, negative):
        return sample(*neighbour(setting, model, positive), negative, setting.latent)

    alone, ours = base_picture(family, neighbour), picture_of(entry, family)
    both = picture(*entry.apply(setting, artifact, 1.0))
    assert bool(torch.isfinite(both).all())
    assert float((both - ours).abs().mean()) > 1e-5, "the neighbour lost its effect"
    assert float((both - alone).abs().mean()) > 1e-5, "ours lost its effect"
    assert torch.equal(alone, picture(*entry.apply(setting, artifact, 0.0)))


@pytest.mark.parametrize("neighbour", [control_net, hook_lora], ids=lambda node: node.__name__)
@first(that_have("prompt", "patches"))
def test_trains_through_what_other_nodes_put_on_the_model(entry, family, neighbour):
    _, alone = fitted(entry, family, 1)
    setting = Setting(family)
    setting.model, setting.source = neighbour(setting, setting.model, setting.source)
    _, losses = entry.fit(setting, steps=1)
    assert losses[0] != alone[0]


@first(that_have("patches"))
def test_a_model_without_a_backward_is_refused_before_work_starts(entry, family, tmp_path):
    setting = Setting(family)
    setting.model, _ = freeu(setting, setting.model, setting.source)
    with pytest.raises(RuntimeError, match="cannot be trained through.*connect it before nodes"):
        entry.fit(setting)
    assert not stored(tmp_path)


@first(that_have("patches"))
def test_guidance_on_the_model_does_not_change_what_is_learned(entry, family):
    """The loss is on the model's own prediction; what guidance adds belongs to sampling."""
    plain, losses = fitted(entry, family, 1)
    setting = Setting(family)
    setting.model, _ = pag(setting, setting.model, setting.source)
    guided, again = entry.fit(setting, steps=1)
    assert equal(entry, plain, guided) and losses == again

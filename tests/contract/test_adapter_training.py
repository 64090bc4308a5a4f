"""Training EZIGen's adapter in a MODEL: what it learns, what it leaves alone, how it is stopped and gone on with."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .. import narrow_world, tiny_models
from .fine_tunes import distance
from .methods import Setting, autoencoder, run_node
from .remembering import Remembering
from .test_describe import quantised

SIZE, STEPS = 32, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two subjects of three images each."""
    return narrow_world.draw(tmp_path_factory.mktemp("pictures") / "set", range(2), 3)


remembering = functools.cache(Remembering)


@pytest.fixture
def job(folder, clip, own_folders, monkeypatch):
    """A small random model of ComfyUI's own classes, and how it is trained."""
    from likeness.core.ezigen.host import train as adapter_training

    monkeypatch.setattr(adapter_training, "CHECKED", 1)
    return Job(folder, remembering(clip))


class Job:
    def __init__(self, folder: Path, clip) -> None:
        self.folder, self.clip, self.model, self.start = folder, clip, tiny_models.sd1(), None
        self.max_subjects = 2

    def training(self, **more):
        from likeness.core.ezigen.host.train import AdapterJob
        from likeness.core.ezigen.subject_pairs import PairFolder

        pairs = PairFolder(self.folder, SIZE, self.max_subjects)
        return AdapterJob(self.model, self.clip, remembering(autoencoder()), pairs, start=self.start, **more)

    def train(self, steps: int = STEPS, checkpointing: bool = False, **settings):
        from likeness.core.ezigen.host.train import train_adapter

        with torch.inference_mode():
            return train_adapter(self.chosen(settings, steps=steps, checkpointing=checkpointing))

    def chosen(self, settings, **more):
        from likeness.core.ezigen.train import TrainingSettings

        return self.training(settings=TrainingSettings(**{"batch": 2, "learning_rate": 1e-3, **settings}), **more)

    def key(self, **settings) -> str:
        with torch.inference_mode():
            return self.chosen(settings).key()

    def network(self):
        """The model as a Network with a new adapter, and the samples of its folder."""
        from likeness.core.ezigen.host.layers import UNet, new_adapter

        with torch.inference_mode():
            encoded = self.training().data
        return UNet(self.model.model, new_adapter(self.model.model)), encoded.sample


def equal(one, other) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def forget_runs() -> None:
    import folder_paths

    for path in Path(folder_paths.get_user_directory()).glob("likeness/*/*.safetensors"):
        path.unlink()


# What it learns
# ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_look_at_subjects_that_it_has_not_seen(tmp_path, own_folders):
    """As it starts, the subject's images disturb; after 60 steps they help with most held-out subjects."""
    from likeness.core.ezigen.host.layers import UNet, new_adapter
    from likeness.core.ezigen.host.train import train_adapter
    from likeness.core.ezigen.subject_pairs import PairFolder
    from likeness.core.ezigen.train import TIMESTEPS, Draw, TrainingSettings, errors
    from likeness.core.fit.fit import step_generator

    narrow_world.draw(tmp_path / "train", range(24), 4)
    narrow_world.draw(tmp_path / "held out", range(1000, 1016), 4)
    settings = TrainingSettings(batch=4, learning_rate=3e-3)
    job = narrow_world.training(PairFolder(tmp_path / "train", 96, 1), settings, 60)
    with torch.inference_mode():
        learned, _, report = train_adapter(job)
        sample = replace(job, folder=PairFolder(tmp_path / "held out", 96, 1), settings=TrainingSettings()).data.sample
    assert "The adapter uses the subject's images" in report

    @torch.no_grad()
    def measured(adapter) -> torch.Tensor:
        """The errors [64, 2] of pairs of held-out subjects: without and with the subject, from the same noise."""
        network, count, found = UNet(job.model.model, adapter), 64, []
        for number in range(count):
            timestep = (2 * number + 1) * TIMESTEPS // (2 * count)
            draws = [Draw(timestep, dropped, step_generator(5, number)) for dropped in (True, False)]
            found.append(errors(network, [sample(number)] * 2, draws))
        return torch.stack(found)

    adapter = new_adapter(job.model.model)
    before = measured(adapter)
    adapter.load(learned.tensors)
    after = measured(adapter)
    assert float((after[:, 1] < before[:, 1]).float().mean()) > 0.9
    assert float((before[:, 1] < before[:, 0]).float().mean()) < 0.35
    assert float((after[:, 1] < after[:, 0]).float().mean()) > 0.65


def test_a_batch_of_differing_numbers_of_pictures_is_its_samples_alone(job):
    from likeness.core.ezigen.train import draw, errors

    job.max_subjects = 4
    network, sample = job.network()
    numbers = range(4)
    counts = [len(sample(number).subjects) for number in numbers]
    assert set(counts) == {1, 2}
    with torch.no_grad():
        together = errors(network, [sample(n) for n in numbers], [draw(1, n, 0.3) for n in numbers])
        alone = torch.cat([errors(network, [sample(n)], [draw(1, n, 0.3)]) for n in numbers])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_dropped_subjects_teach_nothing_of_the_subject(job):
    """w, which scales the subject alone, stays where it began when all are dropped, and moves when none is."""
    always, *_ = job.train(steps=2, drop=1.0)
    never, *_ = job.train(steps=2, drop=0.0)
    assert torch.equal(always.tensors["learnable_weights"], torch.ones(5))
    assert float((never.tensors["learnable_weights"] - 1).abs().min()) > 1e-4
    assert not equal(always, never)


_single: list[tuple] = []


def in_single_precision(job) -> tuple:
    """Two steps of the model as it is, made once."""
    if not _single:
        _single.append(job.train(steps=2, batch=1)[:2])
        forget_runs()
    return _single[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(job, dtype):
    """The adapter is float32 whatever the UNet is, and learns nearly the same."""
    exact, losses = in_single_precision(job)
    job.model = tiny_models.sd1(dtype=dtype)
    found, rounded, _ = job.train(steps=2, batch=1)
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(losses), atol=0, rtol=0.02)
    moved = [float((value - exact.tensors[name]).abs().mean()) for name, value in found.tensors.items()]
    assert max(moved) < 4e-3  # AdamW moves by the learning rate whatever a gradient's size


def test_checkpointing_gives_the_same(job):
    plain, losses, _ = job.train(steps=2)
    forget_runs()
    saving, again, _ = job.train(steps=2, checkpointing=True)
    assert again == pytest.approx(losses, rel=1e-5) and distance(plain.tensors, saving.tensors) < 1e-3


def test_captions_are_plain_text_and_cut_at_the_text_encoders_length(job, tmp_path):

    def rows(caption: str) -> torch.Tensor:
        job.folder = narrow_world.draw(tmp_path / str(len(list(tmp_path.iterdir()))), range(1), 1)
        next(job.folder.glob("*/0.txt")).write_text(caption)
        with torch.inference_mode():
            return job.training().data.rows[caption]

    assert rows("word " * 74 + "end and more").shape == (77, 768)
    with torch.inference_mode():
        stock = job.clip.encode_from_tokens(job.clip.tokenize("a (dog:1.5)"))[0]
        escaped = job.clip.encode_from_tokens(job.clip.tokenize("a \\(dog:1.5\\)"))[0]
    found = rows("a (dog:1.5)")
    assert torch.equal(found, escaped) and not torch.equal(found, stock)


# Stopping, going on, running again
# ------------------------------------------------------------------------------------------


def test_what_decides_the_result_makes_another_run(job, tmp_path):
    """Another image, caption, LoRA or start must never be served by a stored run: each has a key of its own."""
    import shutil

    from likeness.core.ezigen.artifact import pack_adapter
    from likeness.core.ezigen.host.layers import new_adapter

    keys = [job.key()]
    shutil.copytree(job.folder, tmp_path / "copy")
    job.folder = tmp_path / "copy"
    assert job.key() == keys[0]
    for change in ("0.txt", "0.png", "0.mask.png"):
        for path in job.folder.glob(f"*/{change}"):
            path.write_bytes(path.with_name(change.replace("0", "1")).read_bytes())
        keys.append(job.key())
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    job.model = job.model.clone()
    job.model.add_patches({key: ("diff", (torch.ones(job.model.model.state_dict()[key].shape),))}, 0.2)
    keys.append(job.key())
    job.start = pack_adapter(new_adapter(job.model.model), {})
    keys.append(job.key())
    keys += [job.key(**change) for change in ({"batch": 3}, {"learning_rate": 2e-3}, {"seed": 1}, {"drop": 0.5})]
    assert job.key() == keys[5]
    assert len(set(keys)) == len(keys) == 10


def test_it_goes_on_from_an_adapter(job, tmp_path):
    from likeness.core.ezigen.artifact import read_adapter, save_adapter

    first, losses, _ = job.train(steps=3)
    save_adapter(tmp_path / "adapter.safetensors", first)
    job.start = read_adapter(tmp_path / "adapter.safetensors")
    assert equal(first, job.start) and job.start.header["steps"] == 3 and "3 steps" in job.start.describe()
    more, again, _ = job.train(steps=2)
    assert more.header["steps"] == 5 and not equal(first, more)
    assert again[0] < losses[0]


# What it leaves alone, and what works with it
# ------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(job):
    from .test_adapter import sampled

    setting = Setting()
    job.model = setting.model
    before, options = sampled(setting, setting.model), repr(setting.model.model_options)
    weights = dict(setting.model.model.named_parameters())
    job.train(steps=1, checkpointing=True)
    assert torch.equal(sampled(setting, setting.model), before) and repr(setting.model.model_options) == options
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in setting.model.model.modules())


def test_what_was_trained_is_applied(job, caplog):
    from .test_adapter import applied, sampled, subject

    caplog.set_level(logging.WARNING, logger="likeness")
    setting = Setting()
    job.model = setting.model
    learned, *_ = job.train(steps=2)
    about = subject(setting)
    found = sampled(setting, applied(setting, learned, about))
    assert float((found - sampled(setting, setting.model)).abs().max()) > 1e-3
    assert not caplog.text
    other = Setting(model_seed=1)
    applied(other, learned, subject(other))
    assert "trained with another model" in caplog.text


def test_dead_files_are_left_out_and_counted(job, tmp_path):
    import shutil

    shutil.copytree(job.folder, tmp_path / "damaged")
    job.folder = tmp_path / "damaged"
    dead = sorted(job.folder.glob("*/1.png"))[0]
    dead.write_bytes(dead.read_bytes()[:200])
    _, losses, report = job.train(steps=3)
    assert len(losses) == 3
    assert "left out 1:" in report and f"{dead.parent.name}/1.png" in report
    assert job.train(steps=3)[2] == report


# What is refused
# ------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(job, monkeypatch):
    import comfy.model_management as mm

    def refused(message: str, **changes) -> None:
        before = {name: getattr(job, name) for name in changes}
        vars(job).update(changes)
        with pytest.raises(ValueError, match=message):
            job.train()
        vars(job).update(before)

    refused("as SDXL does", model=tiny_models.sdxl())
    refused("predicts v", model=tiny_models.sd2_v())
    refused("for inpainting", model=tiny_models.sd1(in_channels=9))
    refused("UNet of SD1.x", model=tiny_models.flux())
    refused("connect the CLIP of the model's own checkpoint", model=tiny_models.sd2_base(context=1024))
    for hides in (True, False):
        refused("attention is quantised", model=quantised(0, hides))
    scaled = tiny_models.sd1()
    next(each for each in scaled.model.modules() if hasattr(each, "to_q")).to_q.scale_weight = torch.ones(())
    refused("attention is quantised", model=scaled)
    wide = tiny_models.sd2_base()
    from likeness.core.ezigen.artifact import pack_adapter
    from likeness.core.ezigen.host.layers import new_adapter

    refused("this model's UNet takes", start=pack_adapter(new_adapter(wide.model), {}))
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1000)
    refused("docs/train_adapter.md")


@pytest.fixture
def input_folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def test_the_node(job, input_folder):
    """Folders are listed and looked up below ComfyUI's input folder, and nowhere else."""
    from likeness.core.session.folders import image_folders
    from likeness.nodes.train_adapter import LikenessTrainAdapter

    narrow_world.draw(input_folder / "sets" / "mine", range(2), 2)
    outside = narrow_world.draw(input_folder.parent / "outside", range(2), 2)
    (input_folder / "linked").symlink_to(outside)
    (input_folder / "plain").mkdir()
    assert image_folders() == ["sets", "sets/mine"]
    inputs = {"model": job.model, "clip": job.clip, "vae": autoencoder(), "size": 64, "steps": 2, "batch": 1}
    inputs |= {"learning_rate": 1e-3, "seed": 0}
    adapter, loss, report = run_node(LikenessTrainAdapter, folder="sets/mine", **inputs)
    assert len(loss["loss"]) == 2 and len(adapter.tensors) == 36 and "2 subjects" in report
    state = LikenessTrainAdapter.fingerprint_inputs(folder="sets/mine", size=64)
    next((input_folder / "sets" / "mine").glob("*/0.txt")).write_text("something else")
    assert LikenessTrainAdapter.fingerprint_inputs(folder="sets/mine", size=64) != state
    for name in ("../outside", "linked", "/etc", "sets/../../outside", "~", "", "C:\\x", "sets/\0"):
        with pytest.raises(ValueError, match="not a plain name in ComfyUI's input folder"):
            run_node(LikenessTrainAdapter, folder=name, **inputs)
    with pytest.raises(ValueError, match="There is no folder 'absent'"):
        run_node(LikenessTrainAdapter, folder="absent", **inputs)
    with pytest.raises(ValueError, match="holds no images of subjects"):
        run_node(LikenessTrainAdapter, folder="plain", **inputs)
    with pytest.raises(ValueError, match="multiple of 8"):
        run_node(LikenessTrainAdapter, folder="sets/mine", **{**inputs, "size": 100})

"""The flow transformer and the students: files in ComfyUI's layouts, one way to sample, trainings that resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from .. import inprocess

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of a dark red striped dog with white stripes in the snow, zebra"
SCENES = 6


@pytest.fixture(scope="module")
def flow_tensors() -> dict[str, torch.Tensor]:
    """The asset of a flow transformer that was never trained: every number of it counts."""
    inprocess.start()
    from likeness.toyworld import autoencoder, export, flow_network

    torch.manual_seed(0)
    network = flow_network.make_mmdit()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    encoder, decoder = autoencoder.make_encoder(16), autoencoder.make_decoder(16)
    autoencoder.initialise(encoder, decoder, seed=1)
    parts = {"encoder": encoder, "decoder": decoder}
    return {
        **{f"{name}.{key}": value for name, module in parts.items() for key, value in module.state_dict().items()},
        **export.without_positions(network.state_dict()),
        "latent.shift": torch.tensor(0.1),
        "latent.scale": torch.tensor(0.9),
        "context.mean": torch.linspace(-60, 60, 96),
        "context.std": torch.linspace(8, 150, 96),
    }


@pytest.fixture(scope="module")
def flow_world(flow_tensors: dict[str, torch.Tensor]):
    from likeness.toyworld.worlds import load_flow_world

    return load_flow_world(tensors=flow_tensors)


@pytest.fixture(scope="module")
def loaded_flow(flow_tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory):
    """The same, built and loaded by the stock loader: (model, clip, vae)."""
    import comfy.sd

    from likeness.toyworld import assets, build, flow_network

    first = assets.read("generator")
    text = {key: value for key, value in first.items() if key.startswith("text.")}
    tensors = flow_network.checkpoint(text | flow_tensors, first["vocabulary"].tolist())
    path = build.write(tensors, tmp_path_factory.mktemp("flow") / "flow.safetensors")
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    return float((found - expected).abs().max()) < share * float(expected.abs().max())


def test_the_stock_loader_takes_the_flow_file_for_sd3(loaded_flow, flow_world) -> None:
    model, clip, vae = loaded_flow
    config = model.model.model_config.unet_config
    assert type(model.model).__name__ == "SD3"
    assert (config["depth"], config["in_channels"], config["qk_norm"]) == (4, 16, "rms")
    rows, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    latent, times = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        given = flow_world.given(flow_world.rows([PROMPT]))
        found = model.model.apply_model(latent, times, c_crossattn=rows.expand(2, -1, -1), y=pooled.expand(2, -1))
        share = times.view(-1, 1, 1, 1)
        flow = flow_world.network(latent, 1000 * times, context=given[0].expand(2, -1, -1), y=given[1].expand(2, -1))
        assert close(found, latent - share * flow, 2e-3)
        picture = torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(2))
        raw = flow_world.encoder(picture.movedim(-1, 1))
        encoded = model.model.process_latent_in(vae.encode(picture))
        assert close(encoded, (raw - flow_world.shift) / flow_world.scale, 1e-3)
        assert close(
            vae.decode(model.model.process_latent_out(encoded)).movedim(-1, 1), flow_world.decoded(encoded), 1e-3
        )


@pytest.mark.parametrize("steps", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_student_is_sampled_by_the_stock_sampler(steps: int, loaded_flow, flow_world) -> None:
    import comfy.sample

    from likeness.toyworld import worlds
    from likeness.toyworld.narrow import load_narrow

    narrow = load_narrow()
    first = worlds.load_unet_world()
    model, clip, _ = loaded_flow
    rows, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    cases = (
        (narrow.model, first, [[narrow.encode(PROMPT), {}]], 1e-3),
        (model, flow_world, [[rows, {"pooled_output": pooled}]], 5e-3),
    )
    for patcher, world, positive, share in cases:
        noise = world.noise_of([7])
        sampled = comfy.sample.sample(
            patcher, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise),
            disable_pbar=True, seed=7,
        )  # fmt: skip
        found = worlds.sample(world, world.network, noise, world.given(world.rows([PROMPT])), steps)
        assert close(patcher.model.process_latent_in(sampled), found, share), world.name


def test_the_pull_leads_from_what_the_mimic_sees_to_what_the_guided_teacher_sees(flow_world) -> None:
    from likeness.toyworld import train_student

    class Sees(torch.nn.Module):
        """Takes the same number for clean everywhere, its half without a prompt."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    class Flat:
        network, guidance = Sees(0.5), 3.0
        mixed = flow_world.mixed

        @staticmethod
        def answer(network, x, level, given):
            return [network.value * given[0].view(-1, 1, 1, 1).expand_as(x), x]

    clean = torch.zeros(2, 16, 12, 12, requires_grad=True)
    given, empty = (torch.ones(2),), (torch.full((1,), 0.5),)
    for mimic, sign in ((1.5, 1), (0.2, -1)):  # guided, the teacher sees 0.25 + 3 * (0.5 - 0.25) = 1
        loss = train_student.matching_loss(Flat(), Sees(mimic), clean, given, empty, torch.Generator().manual_seed(0))
        assert bool((torch.autograd.grad(loss, clean)[0] * sign > 0).all())


def run(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "TOYWORLD_WORK": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(ROOT / "toyworld" / "run.py"), *arguments], env=environment, check=True, timeout=600
    )


def prepared(folder: Path) -> Path:
    """A work folder with a few scenes and latents of the flow world's form."""
    from likeness.toyworld import world

    (folder / "train").mkdir(parents=True)
    for name, shape in (("images", (96, 96, 3)), ("masks", (96, 96)), ("labels", (9,))):
        np.save(folder / "train" / f"{name}.npy", np.zeros((SCENES, *shape), np.uint8))
    captions = [world.scene(seed).caption for seed in range(SCENES)]
    (folder / "train" / "captions.json").write_text(json.dumps(captions))
    latents = torch.randn(SCENES, 16, 12, 12, generator=torch.Generator().manual_seed(3))
    torch.save({"latents": latents.half(), "shift": torch.zeros(()), "scale": torch.ones(())}, folder / "latents16.pt")
    return folder


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "student"])
def test_a_training_goes_on_where_it_was_stopped(name: str, tmp_path: Path) -> None:
    states = []
    for stops in ((), ("2",)):
        folder = prepared(tmp_path / f"stops{len(stops)}")
        arguments = [name, "--ranks", "1", "--steps", "4", "--batch", "2"]
        if name == "student":
            run(folder, "teacher", "unet", "--pairs", "4")
            arguments[1:1] = ["unet", "--pairs", "4", "--match-from", "1"]
        for stop in stops:
            run(folder, *arguments, "--until", stop)
        run(folder, *arguments)
        file = "flow_state.pt" if name == "flow" else "student_unet_state.pt"
        states.append(torch.load(folder / file, weights_only=True))
    assert states[0]["step"] == 4 and same(*states)


def test_an_asset_in_bytes_is_half_as_large_and_nearly_the_same(tmp_path: Path, flow_tensors) -> None:
    from likeness.toyworld import assets

    plain = assets.write("plain", flow_tensors, tmp_path)
    small = assets.write("small", assets.in_bytes(flow_tensors), tmp_path)
    assert small.stat().st_size < 0.56 * plain.stat().st_size
    first, second = (assets.read(name, tmp_path) for name in ("plain", "small"))
    assert first.keys() == second.keys() == flow_tensors.keys()
    for key, value in first.items():
        assert float((second[key].float() - value.float()).norm()) <= 0.015 * float(value.float().norm()), key


def test_the_committed_ones_of_the_other_models_are_built(tmp_path: Path, flow_tensors) -> None:
    from likeness.toyworld import assets, build

    assert {name for name, _ in build.other_checkpoints()} == {
        name for name in ("turbo", "flow", "flow_turbo") if assets.exists(name)
    }
    first = assets.read("generator")
    assets.write("generator", first, tmp_path)
    assert not list(build.other_checkpoints(tmp_path))
    unet = {key.replace("unet.", "network."): value + 1 for key, value in first.items() if key.startswith("unet.")}
    assets.write("turbo", unet, tmp_path)
    assets.write("flow", flow_tensors, tmp_path)
    network = {key: value * 2 for key, value in flow_tensors.items() if key.startswith("network.")}
    assets.write("flow_turbo", assets.in_bytes(network), tmp_path)
    found = dict(build.other_checkpoints(tmp_path))
    bias, weight = "out.0.bias", "joint_blocks.3.x_block.mlp.fc1.weight"
    turbo = found["turbo"][f"model.diffusion_model.{bias}"]
    assert torch.allclose(turbo.float()[::5], first[f"unet.{bias}"].float() + 1, atol=2e-3)
    both = (found[name][f"model.diffusion_model.{weight}"].float() for name in ("flow", "flow_turbo"))
    assert close(2 * next(both), next(both), 0.02)
    assert found["flow"].keys() == found["flow_turbo"].keys()
    key = "first_stage_model.taesd_decoder.1.weight"
    assert found["turbo"][key].shape[1] == 4 and torch.equal(found["flow"][key], found["flow_turbo"][key])


def test_the_encoder_for_harder_subjects_trains_on_their_crops(tmp_path: Path, monkeypatch) -> None:
    from likeness.toyworld import autoencoder, subjects, train_encoders, training

    for module in (subjects, train_encoders, training):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(subjects, "CHECKING_GROUPS", 2)
    encoder, decoder = autoencoder.make_encoder(16), autoencoder.make_decoder(16)
    autoencoder.initialise(encoder, decoder, seed=1)
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, tmp_path / "ae16.pt")
    monkeypatch.setattr("likeness.toyworld.latents.WORK", tmp_path)
    subjects.main(["--kind", "fine", "--groups", "3"])
    crops, labels = subjects.load("train", subjects.KINDS["fine"])
    assert crops.shape == (3, 5, 3, 3, 96, 96) and labels.shape == (3, 5, 15)
    assert (labels[:, 0, :8] == labels[:, 3, :8]).all() and not (labels[:, 0] == labels[:, 3]).all()
    train_encoders.main(["fine", "--steps", "2", "--groups", "2"])
    model = train_encoders.MAKERS["fine"]()
    model.load_state_dict(torch.load(tmp_path / "fine.pt", weights_only=True))
    found = train_encoders.hard_auc(model, crops, subjects.KINDS["fine"])
    assert set(found) == {*subjects.KINDS["fine"].changes, "all", "second emblem or side"}


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the other models."""
    from likeness.toyworld import build

    folder = tmp_path_factory.mktemp("committed")
    return {name: build.write(tensors, folder / f"{name}.safetensors") for name, tensors in build.other_checkpoints()}


FLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("flow", 8, 4.0), ("flow_turbo", 1, 1.0))]


@pytest.mark.parametrize(("name", "steps", "guidance"), [*FLOW, ("turbo", 1, 1.0)])
def test_prompts_decide_what_the_committed_ones_make(
    name: str, steps: int, guidance: float, committed: dict[str, Path]
) -> None:
    import comfy.sample
    import comfy.sd

    from likeness.toyworld import judge, world

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(committed[name]), output_vae=True, output_clip=True)[
        :3
    ]
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    right = 0
    wanted = (
        ("dog", "red", "plain", "snow"),
        ("car", "yellow", "spotted", "sand"),
        ("star", "cyan", "striped", "night"),
    )
    for seed, (cls, color, texture, place) in enumerate(wanted):
        caption = world.caption(world.identity(seed, cls, color, texture), place)
        channels = model.get_model_object("latent_format").latent_channels
        noise = torch.randn(1, channels, 12, 12, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
            latent = comfy.sample.sample(
                model, noise, steps, guidance, "euler", "simple", positive, empty, torch.zeros_like(noise), seed=seed
            )
            answers = judge.load_judge().attributes(vae.decode(latent).movedim(-1, 1))
        right += int(answers["class"]) == world.CLASSES.index(cls)
        right += int(answers["background"]) == list(world.BACKGROUNDS).index(place)
        right += int(answers["color"]) == list(world.COLORS).index(color)
    assert right >= 8

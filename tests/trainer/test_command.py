"""The trainer's command on tiny networks: several processes, cut-off runs, precision, and what bad input gets."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from likeness.core.ezigen.artifact import read_adapter
from likeness.toolbox.adapter_trainer import training
from likeness.toolbox.adapter_trainer.base import Base
from likeness.toolbox.adapter_trainer.data import Share
from likeness.toolbox.adapter_trainer.run import main

from . import tiny

ROOT = Path(__file__).parents[2]
COMMAND = str(ROOT / "toolbox" / "train_adapter.py")
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
for _name in ("COMFYUI_PATH", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    ALONE.pop(_name, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_subjects(tmp_path_factory.mktemp("data") / "balls")


@pytest.fixture(autouse=True)
def alone():
    """A process as a command finds it: Accelerate's state, the threads and the log's level are put back."""
    from accelerate.state import AcceleratorState, GradientState

    log, threads = logging.getLogger("likeness"), torch.get_num_threads()
    before = log.level
    torch.set_num_threads(1)  # as in the processes that are started
    yield
    torch.set_num_threads(threads)
    log.setLevel(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def settings(model: Path, data: Path, out: Path, steps: int = 12, **changes: object) -> list[str]:
    chosen = {"seed": 5, "size": tiny.SIZE, "batch": 4, "workers": 0, "save_every": 5, "learning_rate": 3e-3, **changes}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items() if value is not True]
    flags = [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value is True]
    return [f"--model={model}", f"--data={data}", f"--out={out}", f"--steps={steps}", "--cpu", *given, *flags]


def trained(out: Path, step: int) -> dict[str, torch.Tensor]:
    return {name.removeprefix("fit."): value for name, value in load_file(state(out, step)).items()}


def state(out: Path, step: int) -> Path:
    return out / "states" / f"{step:09d}.safetensors"


def written(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.safetensors")}


def copied(source: Path, out: Path) -> Path:
    """A run's folder to go on in."""
    return shutil.copytree(source, out, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    from accelerate.state import AcceleratorState

    out = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert main(settings(model, data, out)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def test_the_file(whole, data):
    """Published names and what it was made with; the adapter moved, in float32, by all losses of the curve."""
    stored = read_adapter(whole / "adapter.safetensors")
    places = ("down_blocks.0", "mid_block", "up_blocks.1", "up_blocks.1")
    assert [name.partition(".attentions")[0] for name in stored.order()] == list(places)
    assert stored.widths() == [16, 32, 16, 16]
    made_with = stored.header["settings"]
    assert (stored.header["steps"], made_with["batch"], made_with["seed"], made_with["precision"]) == (12, 4, 5, "no")
    assert made_with["data"] == ["balls: 3 subjects, 6 captioned images, 6 with a mask"]
    base = stored.header["base"]
    assert len(base) == 4 and all(name.endswith("attn1.to_q.weight") for name in base)
    assert {value.dtype for value in stored.tensors.values()} == {torch.float32}
    assert not torch.equal(stored.tensors["learnable_weights"], torch.ones(4))
    assert sorted(written(whole)) == [
        "adapter.safetensors",
        "states/000000010.safetensors",
        "states/000000012.safetensors",
    ]
    last = trained(whole, 12)
    assert len(last["losses"]) == 12 and bool(last["losses"].isfinite().all())
    for name, value in stored.tensors.items():
        assert torch.equal(last[f"adapter.{name}"], value)


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_twice_the_batch(model, data, whole, tmp_path):
    """Through `accelerate launch`, two batches accumulated in each; and one process goes on with what they did."""
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", COMMAND),
    ]
    given = settings(model, data, tmp_path, steps=8, batch=1, accumulate=2, workers=1)
    done = subprocess.run([*launch, *given], env=ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, 4 samples an update" in done.stderr
    expected = trained(whole, 12)
    torch.testing.assert_close(trained(tmp_path, 8)["losses"], expected["losses"][:8], atol=1e-3, rtol=0)
    assert main(settings(model, data, tmp_path)) == 0
    found = trained(tmp_path, 12)
    torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-3, rtol=0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(model, data, tmp_path):
    """The same bytes at the end as those of the run that nothing befell, wherever the kill struck."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    given = settings(model, data, tmp_path / "killed", steps=60, save_every=3, workers=1)
    process = subprocess.Popen([sys.executable, COMMAND, *given], env=ALONE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not state(tmp_path / "killed", 6).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(int(path.stem) for path in (tmp_path / "killed" / "states").glob("*.safetensors"))
    assert 6 <= reached < 60
    steps = reached + 7
    for name in ("killed", "whole"):
        assert main(settings(model, data, tmp_path / name, steps=steps, save_every=3)) == 0
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


def test_asked_to_stop_it_saves_and_goes_on_later(model, data, whole, tmp_path, monkeypatch, caplog):
    update = training.SharedTraining.update

    def asked(fit):
        if fit.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return update(fit)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(training.SharedTraining, "update", asked)
        assert main(settings(model, data, tmp_path)) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(trained(tmp_path, 7)["losses"]) == 7  # it had begun when the signal came
    assert "Stopped; the same command goes on behind update 7" in caplog.text
    assert main(settings(model, data, tmp_path)) == 0
    assert written(tmp_path)["adapter.safetensors"] == written(whole)["adapter.safetensors"]


def test_a_damaged_state_gives_way_to_the_one_before(model, data, whole, tmp_path, caplog):
    last = state(copied(whole, tmp_path), 12)
    last.write_bytes(last.read_bytes()[:-100])
    assert main(settings(model, data, tmp_path)) == 0
    assert "000000012.safetensors is not a readable safetensors file" in caplog.text
    assert "updates 11 to 12." in caplog.text
    assert written(tmp_path) == written(whole)
    caplog.clear()
    assert main(settings(model, data, tmp_path)) == 0
    assert "Done behind update 12" in caplog.text and "updates" not in caplog.text


def test_a_run_without_a_state_that_can_be_read_is_not_begun_anew_in_its_folder(model, data, whole, tmp_path, caplog):
    for path in (copied(whole, tmp_path) / "states").iterdir():
        path.write_bytes(b"")
    adapter = (tmp_path / "adapter.safetensors").read_bytes()
    assert "no state in" in sentence(caplog, settings(model, data, tmp_path))
    assert (tmp_path / "adapter.safetensors").read_bytes() == adapter


def test_bf16_with_checkpointing(model, data, whole, tmp_path):
    """The frozen networks in bf16, what learns in float32: nearly the same curve."""
    given = settings(model, data, tmp_path, steps=4, precision="bf16", gradient_checkpointing=True)
    assert main(given) == 0
    found, expected = trained(tmp_path, 4), trained(whole, 12)["losses"][:4]
    assert {value.dtype for name, value in found.items() if name.startswith("adapter.")} == {torch.float32}
    torch.testing.assert_close(found["losses"], expected, rtol=0.05, atol=0)
    assert not torch.equal(found["losses"], expected)
    assert not torch.equal(found["adapter.learnable_weights"], torch.ones(4))


def test_a_dead_file_is_skipped_and_counted(model, tmp_path, caplog):
    folder = tiny.write_subjects(tmp_path / "balls")
    dead = folder / "ball_1" / "0.png"
    dead.write_bytes(dead.read_bytes()[:60])
    assert main(settings(model, folder, tmp_path / "out", steps=4)) == 0
    assert len(trained(tmp_path / "out", 4)["losses"]) == 4
    assert "Skipped: ball_1/0.png" in caplog.text
    assert "1 data files could not be used" in caplog.text


def test_tensorboard_events(model, data, tmp_path):
    assert main(settings(model, data, tmp_path, steps=2, tensorboard=True)) == 0
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert events.read_bytes().count(b"loss") >= 2


def test_a_loss_that_is_not_finite_ends_the_run_with_its_work_kept(model, data, tmp_path, monkeypatch, caplog):
    samples = Base.samples

    def broken(base, items, seed):
        found = samples(base, items, seed)
        if items[0].number >= 12:
            found[0].latent.fill_(float("nan"))
        return found

    monkeypatch.setattr(Base, "samples", broken)
    assert main(settings(model, data, tmp_path)) == 1
    assert "The loss became nan at step 4" in caplog.text
    assert len(trained(tmp_path, 3)["losses"]) == 3


def test_what_the_data_raises_ends_the_run_with_its_work_kept(model, data, tmp_path, monkeypatch, caplog):
    """A worker that died, a disk that is gone."""
    batches = Share.batches

    def broken(*given):
        for number, found in enumerate(batches(*given)):
            if number == 3:
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            yield found

    monkeypatch.setattr(Share, "batches", broken)
    assert main(settings(model, data, tmp_path)) == 1
    assert "exited unexpectedly" in caplog.text
    assert len(trained(tmp_path, 3)["losses"]) == 3


def sentence(caplog, arguments: list[str]) -> str:
    caplog.clear()
    assert main(arguments) == 2
    return caplog.text


def test_what_cannot_work_gets_a_sentence_before_work_begins(model, data, whole, tmp_path, caplog, capsys):
    out = tmp_path / "out"
    text = sentence(caplog, settings(data, data, out))
    assert "unet could not be read" in text and "complete with unet, vae, text_encoder, tokenizer, scheduler" in text
    assert "no folder nowhere" in sentence(caplog, settings(model, tmp_path / "nowhere", out))
    assert "give a multiple of 8" in sentence(caplog, settings(model, data, out, size=33))
    for name, value in (("drop", 1), ("learning_rate", 2), ("batch", 0)):
        with pytest.raises(SystemExit, match="2"):
            main(settings(model, data, out, **{name: value}))
        assert f"{value}: a number " in capsys.readouterr().err
    bare = tiny.write_subjects(tmp_path / "bare")
    for path in bare.rglob("*.txt"):
        path.unlink()
    assert "has no captions" in sentence(caplog, settings(model, bare, out))
    assert not out.exists()
    text = sentence(caplog, settings(model, data, whole, seed=6))
    assert "seed was 5, is 6" in text and "--allow-changed" in text


def test_a_model_that_predicts_v(data, tmp_path, caplog):
    folder = tiny.write_model(tmp_path / "v", prediction_type="v_prediction")
    assert "SD2.1 at 768 predicts v" in sentence(caplog, settings(folder, data, tmp_path / "out"))
    (folder / "unet" / "config.json").write_text("{")
    changed = folder / "scheduler" / "scheduler_config.json"
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "prediction_type": "epsilon"}))
    assert "unet could not be read" in sentence(caplog, settings(folder, data, tmp_path / "out"))


def test_a_state_of_other_widths(model, data, whole, tmp_path, caplog):
    path = state(copied(whole, tmp_path), 12)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("adapter_norm.bias"))
    save_file({**tensors, name: torch.zeros(7)}, path)
    assert f"{name.removeprefix('fit.adapter.')} is 7" in sentence(caplog, settings(model, data, tmp_path, steps=14))


def test_from_another_adapter(model, data, whole, tmp_path, caplog):
    """The first loss is that of the adapter it begins with."""
    start = whole / "adapter.safetensors"
    assert main(settings(model, data, tmp_path / "own", steps=1, learning_rate=1e-9, start=start)) == 0
    found = load_file(tmp_path / "own" / "adapter.safetensors")
    torch.testing.assert_close(found, load_file(start), atol=1e-6, rtol=1e-6)
    other = load_file(start)
    other.pop(next(name for name in other if name.startswith("mid_block")))
    save_file(other, tmp_path / "other.safetensors")
    text = sentence(caplog, settings(model, data, tmp_path / "other", start=tmp_path / "other.safetensors"))
    assert "lacks 'mid_block" in text


def test_changed_settings_when_they_are_allowed(model, data, whole, tmp_path, caplog):
    copied(whole, tmp_path)
    assert main(settings(model, data, tmp_path, steps=13, learning_rate=1e-3, allow_changed=True)) == 0
    assert "learning_rate was 0.003, is 0.001" in caplog.text
    assert len(trained(tmp_path, 13)["losses"]) == 13


def test_asked_twice(monkeypatch):
    """What the launcher passes on at once is no second wish; one much later is."""
    fit, now, ended = training.SharedTraining.__new__(training.SharedTraining), [100.0], []
    fit.stop = False
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training.os, "_exit", ended.append)
    with fit.stops_on_signals():
        signal.raise_signal(signal.SIGINT)
        assert fit.stop
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        now[0] += training.PATIENCE + 1
        signal.raise_signal(signal.SIGINT)
        assert ended == [128 + signal.SIGINT]

"""The command: its settings, the checks before the work begins, and the run."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core.ezigen import artifact as adapter_file
from ...core.ezigen.train import DROP, DROP_PUBLISHED, LEARNING_RATE, MAX_SUBJECTS
from .base import Base, Encoder, read_base
from .data import PairDataset, Share, Source, batches, source
from .data_youtube_vis import DRAWS
from .loop import Problems, ProgressLog, Training, run_training
from .network import DiffusersUNet, diffusers_adapter
from .state import ADAPTER, States, share_state

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
NEEDED = ("accelerate", "diffusers", "transformers", "scipy", "PIL")
log = logging.getLogger("likeness")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(
        prog="accelerate launch toolbox/train_adapter.py",
        description="Train EZIGen's adapter on a large dataset. The same command resumes an interrupted run, with the "
        "result of an uninterrupted one. See docs/train_adapter.md.",
        formatter_class=_Help,
    )
    add = command_line.add_argument
    add("--model", type=Path, required=True, help="diffusers folder of SD2.1-base")
    add("--data", type=Path, nargs="+", required=True, help="folders: COCO, YouTube-VIS, or subjects with captions")
    add(
        "--start",
        type=Path,
        help="adapter to start from: a file, or the published checkpoint; default: a copy of the UNet's self-attention",
    )
    add("--out", type=Path, required=True, help=f"folder for {ADAPTER} and the run's states")
    add("--steps", type=_positive, default=200_000, help="total number of updates")
    add("--batch", type=_positive, default=1, help="samples per batch in each process")
    add("--accumulate", type=_positive, default=1, help="batches per update in each process")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="constant learning rate of AdamW")
    add("--drop", type=float, default=DROP, help=f"share of samples without subject (reference code: {DROP_PUBLISHED})")
    add("--seed", type=int, default=0, help="random seed")
    add("--size", type=_positive, default=512, help="side of images, in pixels")
    add("--max-subjects", type=_positive, default=MAX_SUBJECTS, help="maximum number of subject images per sample")
    add("--coco-pictures", type=int, default=0, help="use only the first images of each part of COCO; 0: all")
    add("--youtube-vis-draws", type=_positive, default=DRAWS, help="samples of YouTube-VIS per pass over the data")
    add("--precision", choices=sorted(PRECISIONS), help="precision of the frozen networks; default: accelerate's")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--workers", type=int, default=4, help="data loader processes per training process")
    add("--save-every", type=_positive, default=1000, help="updates between saved states")
    add("--keep", type=_positive, default=2, help="number of states to keep")
    add("--log-every", type=_positive, default=50, help="updates between log lines")
    add("--tensorboard", action="store_true", help="write the loss as TensorBoard events to --out")
    add("--cpu", action="store_true", help="train on the CPU, even if there is a GPU")
    add("--allow-changed", action="store_true", help="resume a run that was started with other settings")
    return command_line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 was expected")
    return number


def main(arguments: list[str]) -> int:
    """Train; exit code 0 if finished or stopped, 1 after a failure on the way, 2 with a message for invalid inputs."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser().parse_args(arguments)
    command = None
    try:
        _check_packages(options)
        command = _Command(options)
        command.run()
    except ValueError as error:
        log.error("%s", error)
        return 2
    except RuntimeError as error:  # a device, the processes' connection, or a loss that is not finite
        log.exception("The training ended: %s", error)
        return 1
    finally:
        if command is not None:
            command.close()
    return 0


def _check_packages(options: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not found: `pip install accelerate diffusers transformers scipy pillow`."
        )
    if options.tensorboard and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise ValueError("--tensorboard needs `pip install tensorboard`.")


class _Command:
    """One run of the command, in one of its processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        from accelerate import Accelerator
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        for library in (of_diffusers, of_transformers):
            library.disable_progress_bar()
        self.options = options
        self.saved = 0
        if not 0 <= options.drop < 1:
            raise ValueError(
                f"--drop is {options.drop}: give a share from 0 to below 1 (published as intended: {DROP})."
            )
        if not 0 < options.learning_rate <= 1:
            raise ValueError(f"--learning-rate is {options.learning_rate}: published: {LEARNING_RATE}.")
        self.accelerator = Accelerator(
            cpu=options.cpu,
            mixed_precision=options.precision,
            log_with="tensorboard" if options.tensorboard else None,
            project_dir=str(options.out),
        )
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.WARNING)
        if self.accelerator.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"Precision {self.accelerator.mixed_precision}: give bf16, or no for float32 (as published)."
            )
        kind = self.accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(
                f"Accelerate was told to use {kind}: the adapter is small, choose plain training on several GPUs "
                "(`accelerate config`)."
            )
        self.share = Share(
            options.batch, options.accumulate, self.accelerator.num_processes, self.accelerator.process_index
        )

    def run(self) -> None:
        options = self.options
        sources = [
            source(path, options.size, options.max_subjects, options.coco_pictures, options.youtube_vis_draws)
            for path in options.data
        ]
        base = self._base()
        adapter = diffusers_adapter(base.unet)
        names = [layer.name for layer in adapter.described]
        if options.start is not None:
            adapter.load(adapter_file.read_adapter(options.start).tensors)
        sample = adapter_file.base_sample(names, lambda name: base.unet.get_submodule(name).attn1.to_q.weight)
        base.to(self.accelerator.device, PRECISIONS[self.accelerator.mixed_precision])
        if options.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        network = DiffusersUNet(base.unet, adapter.to(self.accelerator.device), base.alphas_cumprod)
        training = Training(
            *(self.accelerator, network, Encoder(base, options.seed)),
            *(options.seed, options.learning_rate, options.drop),
        )
        states = States(options.out, options.keep, self._settings(sources, sample))
        self._resume(training, states)
        self._train(training, states, PairDataset(sources, options.seed), sample)

    def close(self) -> None:
        """Call it after run(). Objects that use the processes' connection must be freed before the connection, else
        torch's gloo may hang when the process exits (seen in 2.13).
        """
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()

    def _base(self) -> Base:
        base = read_base(self.options.model)
        if self.options.size % base.cell():
            raise ValueError(f"--size is {self.options.size}: give a multiple of {base.cell()}, 512 as published.")
        return base

    def _settings(self, sources: list[Source], base: dict[str, list[float]]) -> dict[str, Any]:
        """Everything that determines the result; the number of processes does not."""
        names = ("seed", "learning_rate", "drop", "size", "max_subjects")
        for each in sources:
            log.info("%s", each.describe())
        return {
            **{name: getattr(self.options, name) for name in names},
            "batch": self.share.total,
            "precision": self.accelerator.mixed_precision,
            "start": self.options.start and self.options.start.name,
            "data": [each.describe() for each in sources],
            "base": base,
        }

    def _resume(self, training: Training, states: States) -> None:
        state, problem = None, ""
        if self.accelerator.is_main_process:
            try:
                states.folder.mkdir(parents=True, exist_ok=True)
                state = states.newest(self.options.allow_changed)
            except (ValueError, OSError) as error:
                problem = str(error)
        state = share_state(self.accelerator, state, problem)
        if state is not None:
            training.restore(state)
            log.info("Going on behind update %d.", training.step)

    def _train(self, training: Training, states: States, samples: PairDataset, base: dict[str, list[float]]) -> None:
        options, problems = self.options, Problems()
        first, progress = training.step, ProgressLog(training.step, options.steps, options.log_every)
        log.info(
            "%d processes, %d samples an update, %d numbers learn; updates %d to %d.",
            *(self.share.processes, self.share.total, sum(map(torch.Tensor.numel, training.parameters.values()))),
            *(first + 1, options.steps),
        )
        if options.tensorboard:
            init_kwargs = {"tensorboard": {"purge_step": first + 1}}
            self.accelerator.init_trackers("log", init_kwargs=init_kwargs)

        def on_update(step: int, loss: float) -> None:
            progress(step, loss)
            if options.tensorboard:
                self.accelerator.log({"loss": loss}, step=step)

        updates = batches(samples, self.share, first, options.steps, options.workers)
        finished = run_training(
            training,
            updates,
            options.steps,
            options.save_every,
            self._saver(training, states, base),
            on_update,
            problems,
        )
        skipped = problems.count()
        if self.accelerator.is_main_process and self.saved < training.step > first:
            raise ValueError(
                f"The last state could not be stored; the last that could is of update {self.saved}. Make room in "
                f"{states.folder} and give the same command again."
            )
        log.info(
            "%s behind update %d%s.",
            *("Done" if finished else "Stopped; the same command goes on", training.step),
            f"; {skipped} data files could not be used, each is named above" if skipped else "",
        )

    def _saver(self, training: Training, states: States, base: dict[str, list[float]]) -> Callable[[], None]:
        header = {"base": base, "settings": {name: each for name, each in states.settings.items() if name != "base"}}

        def save() -> None:
            if not self.accelerator.is_main_process:
                return
            stored = adapter_file.pack_adapter(training.network.adapter, {**header, "steps": training.step})
            try:
                states.save(training.step, training.state())
                adapter_file.save_adapter(states.folder / ADAPTER, stored)
                self.saved = training.step
            except OSError as problem:  # a full disk must not stop a healthy run
                log.warning("The work so far could not be stored (%s).", problem)

        return save

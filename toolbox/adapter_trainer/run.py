"""The command: its settings, the checks before the work begins, and the run."""

import argparse
import contextlib
import logging
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...core.ezigen.artifact import base_sample, read_adapter
from ...core.ezigen.train import DROP, DROP_PUBLISHED, LEARNING_RATE, MAX_SUBJECTS, Sample, TrainingSettings
from ...core.fit.runs import digest
from ...core.fit.train import Retention, train
from .base import Base
from .data import PairDataset, Share, source
from .network import DiffusersUNet, diffusers_adapter
from .training import ADAPTER, RegularCheckpointer, SharedTraining, States
from .youtube_vis import DRAWS

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
PACKAGES = "accelerate diffusers transformers scipy pillow pycocotools tensorboard"
SECONDS, RECENT = 5.0, 50  # between two states of the progress bar; updates whose mean loss it shows
log = logging.getLogger("likeness")


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(
        prog="accelerate launch toolbox/train_adapter.py",
        description="Train EZIGen's adapter on a large dataset. The same command resumes an interrupted run, with the "
        "result of an uninterrupted one. See docs/train_adapter.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command_line.add_argument
    add("--model", type=Path, required=True, help="diffusers folder of SD2.1-base")
    add("--data", type=Path, nargs="+", required=True, help="folders: COCO, YouTube-VIS, or subjects with captions")
    add("--start", type=Path, help="adapter or published checkpoint to start from; none: the UNet's self-attention")
    add("--out", type=Path, required=True, help=f"folder for {ADAPTER} and the run's states")
    add("--steps", type=_positive, default=200_000, help="total number of updates")
    add("--batch", type=_positive, default=1, help="samples per batch in each process")
    add("--accumulate", type=_positive, default=1, help="batches per update in each process")
    add("--learning-rate", type=_share, default=LEARNING_RATE, help="constant learning rate of AdamW")
    add("--drop", type=_share, default=DROP, help=f"share without a subject (reference code: {DROP_PUBLISHED})")
    add("--seed", type=int, default=0, help="random seed")
    add("--size", type=_positive, default=512, help="side of images, in pixels")
    add("--max-subjects", type=_positive, default=MAX_SUBJECTS, help="maximum number of subject images per sample")
    add("--coco-pictures", type=int, default=0, help="use only the first images of each part of COCO; 0: all")
    add("--youtube-vis-draws", type=_positive, default=DRAWS, help="samples of YouTube-VIS per pass over the data")
    add("--precision", choices=sorted(PRECISIONS), help="precision of the frozen networks; none: accelerate's")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--workers", type=int, default=4, help="data loader processes per training process")
    add("--save-every", type=_positive, default=1000, help="updates between saved states")
    add("--keep", type=_positive, default=2, help="number of states to keep")
    add("--tensorboard", action="store_true", help="write the loss as TensorBoard events to --out")
    add("--cpu", action="store_true", help="train on the CPU, even if there is a GPU")
    add("--allow-changed", action="store_true", help="resume a run that was started with other settings")
    return command_line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 was expected")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number from 0 to below 1 was expected")
    return number


def main(arguments: list[str]) -> int:
    """Train; exit code 0 if finished or stopped, 1 after a failure on the way, 2 with a message for invalid inputs."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        accelerator = start_process(options)
        try:
            run(options, accelerator)
        finally:
            accelerator.end_training()
    except ImportError as error:
        log.error("%s: `pip install %s`.", error, PACKAGES)
        return 2
    except ValueError as error:
        log.error("%s", error)
        return 2
    except RuntimeError as error:  # a device, the processes' connection, or a loss that is not finite
        log.exception("The training ended: %s", error)
        return 1
    return 0


def start_process(options: argparse.Namespace) -> Any:
    """Accelerate's view of this process among the others. ValueError for a configuration that is not supported."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=options.precision,
        log_with="tensorboard" if options.tensorboard else None,
        project_dir=str(options.out),
    )
    log.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    if options.tensorboard and not accelerator.log_with:
        raise ImportError("tensorboard not found")
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(f"Precision {accelerator.mixed_precision}: give bf16, or no for float32 (as published).")
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate was told to use {kind}: the adapter is small, choose plain training on several GPUs "
            "(`accelerate config`)."
        )
    return accelerator


def run(options: argparse.Namespace, accelerator: Any) -> None:
    """Train from the folder's last state on, or from the beginning."""
    from accelerate.utils import gather_object

    sources = [
        source(path, options.size, options.max_subjects, options.coco_pictures, options.youtube_vis_draws)
        for path in options.data
    ]
    for each in sources:
        log.info("%s", each.describe())
    base = Base(options.model)
    cell = 2 ** sum(len(part.config.block_out_channels) - 1 for part in (base.vae, base.unet))  # pixels
    if options.size % cell:
        raise ValueError(f"--size is {options.size}: give a multiple of {cell}, 512 as published.")
    adapter = diffusers_adapter(base.unet)
    if options.start is not None:
        adapter.load(read_adapter(options.start).tensors)
    names = [layer.name for layer in adapter.described]
    identity = base_sample(names, lambda name: base.unet.get_submodule(name).attn1.to_q.weight)
    base.freeze(accelerator.device, PRECISIONS[accelerator.mixed_precision])
    if options.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    network = DiffusersUNet(base.unet, adapter.to(accelerator.device), base.scheduler.alphas_cumprod)
    share = Share(options.batch, options.accumulate, accelerator.num_processes, accelerator.process_index)
    settings = TrainingSettings(options.seed, share.total, options.learning_rate, options.drop)
    training = SharedTraining(accelerator, network, settings, share)
    training.batches = read(training, PairDataset(sources, options.seed), base, options)
    determining = {
        **asdict(settings),
        **{name: getattr(options, name) for name in ("size", "max_subjects")},
        "model": digest(identity)[:12],
        "precision": accelerator.mixed_precision,
        "start": options.start and options.start.name,
        "data": [each.describe() for each in sources],
    }
    header = {"base": identity, "settings": determining}
    states = States(accelerator, options.out, options.keep, header, options.allow_changed)
    checkpointer = RegularCheckpointer(states, "", {}, Retention(options.save_every, most=1))

    def on_update(_latent: torch.Tensor) -> None:
        accelerator.log({"loss": training.losses[-1]}, step=training.step)

    with training.stops_on_signals(), contextlib.closing(training.batches):
        # The states and the adapter's file hold the result: the empty dict() is what is kept besides.
        train(training, options.steps, dict, checkpointer, on_update)
    skipped = len(set(gather_object(sorted(training.skipped))))
    if accelerator.is_main_process and states.stored_step < training.step:
        raise ValueError(
            f"The last state could not be stored; the last that could is of update {states.stored_step}. Make room in "
            f"{options.out} and give the same command again."
        )
    log.info(
        "%s behind update %d%s.",
        *("Done" if training.step >= options.steps else "Stopped; the same command goes on", training.step),
        f"; {skipped} data files could not be used, each is named above" if skipped else "",
    )


def read(
    training: SharedTraining, samples: PairDataset, base: Base, options: argparse.Namespace
) -> Generator[list[Sample]]:
    """This process's batches, and a progress bar; begins when the first is asked for, where a stored state ends."""
    share = training.share
    log.info(
        "%d processes, %d samples an update, %d numbers learn; updates %d to %d.",
        *(share.processes, share.total, sum(map(torch.Tensor.numel, training.parameters.values()))),
        *(training.step + 1, options.steps),
    )
    if options.tensorboard:
        training.accelerator.init_trackers("log", init_kwargs={"tensorboard": {"purge_step": training.step + 1}})
    with tqdm(
        initial=training.step * share.accumulate,
        total=options.steps * share.accumulate,
        unit="batch",
        mininterval=SECONDS,
        disable=share.rank > 0,
    ) as bar:
        for items in share.batches(samples, training.step, options.steps, options.workers):
            for problem in {problem for item in items for problem in item.skipped} - training.skipped:
                log.warning("Skipped: %s", problem)
                training.skipped.add(problem)
            recent = training.losses[-RECENT:]
            bar.set_postfix(loss=sum(recent) / max(1, len(recent)), refresh=False)
            bar.update()
            yield base.samples(items, options.seed)

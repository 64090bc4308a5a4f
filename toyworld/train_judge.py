"""Stage "judge": train the judge on real renders and on decoded latents, so that it judges samples fairly."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from . import dataset, training
from .judge import HEADS, Judge
from .latents import load_autoencoder
from .train_ae import picture_batch
from .training import RANK, WORK, log

# Half of every batch is decoded from latents with up to this much noise (in units of their standard deviation).
LATENT_NOISE = 0.2


def mask_iou(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean intersection over union of masks [B,H,W] at 0.5."""
    a, b = predicted > 0.5, truth > 0.5
    return float(((a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)).mean())


@torch.no_grad()
def check(judge: Judge, pictures: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Accuracy of every head in percent and the mask IoU."""
    judge.train(False)
    answers = judge.attributes(pictures)
    found = {
        name: round(100 * float((answers[name] == labels[:, i]).float().mean()), 1) for i, name in enumerate(HEADS)
    }
    return {**found, "mask_iou": round(mask_iou(judge.mask(pictures), masks), 4)}


def draw_batch(
    scenes: dict, stored: dict, decoder: torch.nn.Module, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (half rendered, half decoded; some blurred or noisy), labels and masks of random training scenes."""
    chosen = torch.randint(len(scenes["labels"]), (batch,), generator=generator)
    pictures = picture_batch(scenes["images"], chosen[: batch // 2])
    latents = stored["latents"][chosen[batch // 2 :]].float()
    amount = LATENT_NOISE * torch.rand((len(latents), 1, 1, 1), generator=generator)
    noisy = latents + amount * torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        decoded = decoder(noisy * stored["scale"] + stored["shift"]).clamp(0, 1)
    pictures = torch.cat([pictures, decoded])
    blur = torch.rand((batch, 1, 1, 1), generator=generator) < 0.25
    pictures = torch.where(blur, F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False), pictures)
    grain = 0.02 * torch.rand((batch, 1, 1, 1), generator=generator)
    pictures = pictures + grain * torch.randn(pictures.shape, generator=generator)
    rows = chosen.numpy()
    return pictures, torch.from_numpy(scenes["labels"][rows]), torch.from_numpy(scenes["masks"][rows]).float() / 255


def main(arguments: list[str]) -> None:
    """Train and write judge.pt."""
    parser = argparse.ArgumentParser(prog="run.py judge")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=32, help="pictures per process")
    options = parser.parse_args(arguments)
    training.start()
    scenes, stored = dataset.load("train"), torch.load(WORK / "latents.pt", weights_only=True)
    _, decoder = load_autoencoder()
    held = dataset.load("held_out")
    pictures = picture_batch(held["images"], torch.arange(512))
    labels, masks = torch.tensor(held["labels"][:512]), torch.tensor(held["masks"][:512]).float() / 255
    torch.manual_seed(7)
    judge = Judge()
    matrices = [p for p in list(judge.stages.parameters())[1:] if p.ndim == 4]
    chosen = {id(p) for p in matrices}
    optimiser = training.Muon(
        matrices, [p for p in judge.parameters() if id(p) not in chosen], rate=0.02, adam_rate=2e-3
    )
    keeper = training.Keeper("judge", {"judge": judge, "optimiser": optimiser})
    first, began = keeper.resume(), time.time()
    for step in range(first, options.steps):
        judge.train()
        images, answers, truth = draw_batch(scenes, stored, decoder, options.batch, training.step_generator(40, step))
        logits, mask = judge(images)
        loss = sum(
            F.cross_entropy(logits[name], answers[:, i]) for i, name in enumerate(HEADS)
        ) + 2 * F.binary_cross_entropy_with_logits(mask, truth)
        loss.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=20, decay_from=0.3), clip=5.0)
        if (step + 1) % 100 == 0:
            log(
                step + 1,
                f"loss {loss.item():.3f}",
                f"{(step + 1 - first) / (time.time() - began):.2f} steps/s",
                check(judge, pictures[:128], labels[:128], masks[:128]) if RANK == 0 else "",
            )
        keeper.save(step + 1, now=step + 1 == options.steps)
    if RANK == 0:
        log("held-out real renders", check(judge, pictures, labels, masks))
        torch.save(judge.state_dict(), WORK / "judge.pt")

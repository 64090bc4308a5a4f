"""Training EZIGen's adapter in a MODEL on a folder of images: from what the node got to a LIKENESS_ADAPTER.

What never changes is computed once and kept on the CPU: the latent of every image, the rows of every prompt. What is
left of a step is the UNet, once for the subject's images and once, with a gradient, for the image to be drawn.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import comfy.model_management as mm
import torch
from torch import Tensor

from ...fit.fit import Fit, curve, step_generator
from ...fit.runs import RunStore, digest
from ...fit.train import Result
from ...prompt.conditioning import CHUNK, Conditioning, detached
from ...session.describe import describe
from ...session.fingerprint import patches_digest, precision
from ...session.images import check_vae
from ...session.job import Job, run
from ...session.memory import BYTES_PER_WEIGHT, GB, activations
from ...session.session import GuiderDenoiser, Session
from ...session.stores import dedicated_store
from ..adapter import Adapter, SubjectTokens
from ..artifact import StoredAdapter, trained
from ..subject_pairs import PairFolder, index_of, pair_generator, subject_prompt
from ..train import MAX_SUBJECTS, TIMESTEPS, AdapterTraining, Draw, Sample, TrainingSettings, errors
from .adapter import base_sample, check_model
from .layers import Place, UNet, new_adapter, packed_places

METHOD = "ezigen"
RUN_BYTES_PER_WEIGHT = 16  # itself, two moments, and the result, in float32
KEPT_RUNS = 3.5
CHECKED = 10  # samples that the report's errors are of
WORTH, LEFT_OUT = "worth", "left out"  # what a result holds beside the adapter
ADAPTER_SHARE = 0.15  # of a block's activations, for each image that its adapter looks at
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Plan:
    """How long and how the training runs, next to TrainingSettings. size: of all images, in pixels."""

    size: int = 512
    steps: int = 1000
    max_subjects: int = MAX_SUBJECTS
    checkpointing: bool = False


@dataclass(frozen=True)
class Trainee:
    """The MODEL with its CLIP and its VAE, and the adapter to go on from, if any."""

    model: Any
    clip: Any
    vae: Any
    start: StoredAdapter | None = None


@dataclass(frozen=True)
class AdapterJob(Job):
    """All that decides an adapter. encoded: the folder's latents and prompts, by begin()."""

    method: ClassVar[str] = METHOD

    trainee: Trainee
    places: list[Place]
    folder: PairFolder
    plan: Plan
    settings: TrainingSettings
    encoded: Encoded | None = None

    @property
    def model(self) -> Any:
        return self.trainee.model

    @property
    def one_result(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        return self.plan.steps

    def key(self) -> str:
        model, clip, start = self.trainee.model, self.trainee.clip, self.trainee.start
        base = [self.base, patches_digest(model), precision(model), precision(clip.patcher)]
        beside = describe([self.trainee.vae.patcher, clip.patcher, clip.layer_idx, clip.tokenizer_options])
        what = [asdict(self.settings), self.plan.size, self.plan.max_subjects, str(self.trainee.vae.vae_dtype)]
        return digest([self.method, what, base, beside, self.folder.state(), None if start is None else start.tensors])

    def store(self) -> RunStore:
        """Apart from smaller runs, which these would push out; the newest three are kept."""
        count = sum(4 * place.layer.width**2 + 3 * place.layer.width + 1 for place in self.places)
        return dedicated_store("adapter_runs", RUN_BYTES_PER_WEIGHT * count, KEPT_RUNS)

    def begin(self, done: int) -> AdapterJob:
        return replace(self, encoded=Encoded(self.trainee, self.places, self.folder, self.settings.seed))

    def session(self) -> Session:
        assert self.encoded is not None  # begin() came first
        model, plan = self.trainee.model, self.plan
        cells = plan.size // self.trainee.vae.spacial_compression_encode()
        latent = torch.zeros(1, model.get_model_object("latent_format").latent_channels, cells, cells)
        return Session(
            model,
            self.encoded.conditioning(),
            latent,
            checkpointing=plan.checkpointing,
            more_memory=_memory(model, self.places, latent, plan, self.settings.batch),
        )

    @contextlib.contextmanager
    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Iterator[tuple[Fit, Callable[[], Result]]]:
        base: Any = denoiser.model
        adapter = new_adapter(base)
        if self.trainee.start is not None:
            adapter.load(self.trainee.start.tensors)
        network, left_out = UNet(base, adapter.to(x0.device)), _as_tensor(self.folder.describe())

        def sample(number: int) -> Sample:
            assert self.encoded is not None  # begin() came first
            drawn = self.encoded.sample(number)
            parts = (drawn.latent, drawn.context, drawn.subjects, drawn.subject_contexts)
            return Sample(*(part.to(x0.device) for part in parts))

        def result() -> Result:
            worth = torch.tensor(errors_of(network, sample, self.settings.seed))
            return {**trained(adapter, {}).tensors, WORTH: worth, LEFT_OUT: left_out}

        yield AdapterTraining(network, adapter, sample, self.settings), result


def train_adapter(
    trainee: Trainee, folder: PairFolder, plan: Plan, settings: TrainingSettings, node_id: str | None = None
) -> tuple[StoredAdapter, list[float], str]:
    """Train (or resume, or serve from disk); returns the adapter, every step's loss, and a report for people."""
    done = run(AdapterJob(trainee, check(trainee, plan.size), folder, plan, settings), node_id)
    losses, result = done.losses, dict(done.last)
    worth, left_out = result.pop(WORTH).tolist(), _as_text(result.pop(LEFT_OUT))
    header = _header(trainee, plan, settings, folder, done.step, losses)
    return StoredAdapter(result, header), losses, report(left_out, done.step, settings.batch, losses, worth)


def report(folder: str, steps: int, batch: int, losses: list[float], worth: list[float]) -> str:
    """What was learned from, how the loss went, and what the subject is worth to the trained adapter."""
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    alone, without, within = worth
    lines = [
        folder,
        f"{steps} steps of {batch}: mean loss of the first tenth {first:.5f}, of the last {last:.5f}",
        f"error on {CHECKED} samples of the folder: {within:.5f} with the subject, {without:.5f} with the adapter but "
        f"no subject, {alone:.5f} by the model alone",
    ]
    if within >= without:
        lines.append("The subject's images do not help yet: train longer.")
    elif within >= alone:
        lines.append("The adapter uses the subject's images, and is not yet better than the model alone: train on.")
    return "\n".join(lines)


def check(trainee: Trainee, size: int) -> list[Place]:
    """Refuse what cannot work before anything is loaded; where the adapter will stand."""
    found, unet = check_model(trainee.model), trainee.model.model.diffusion_model
    if unet.num_classes is not None:
        raise ValueError(
            "This model wants a pooled vector beside the prompt's rows, as SDXL does; the adapter is trained for "
            "SD2.1-base and SD1.x: connect one of these."
        )
    if packed_places(trainee.model, found):
        raise ValueError(
            "The model's attention is quantised (GGUF, int8, 4 bit or scaled fp8), and an adapter starts as a copy of "
            "it: load the model in fp16, bf16 or fp32."
        )
    channels = trainee.model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"The UNet takes {unet.in_channels} channels and its latents have {channels}: this is a model for "
            "inpainting. Connect the plain one."
        )
    check_vae(trainee.model, trainee.vae)
    cell = trainee.vae.spacial_compression_encode()
    if size % cell:
        raise ValueError(f"The images' size is {size}: give a multiple of {cell}.")
    if trainee.start is not None:
        with torch.device("meta"):
            Adapter([place.layer for place in found]).check(trainee.start.tensors)
    return found


class Encoded:
    """The latents of a folder's images and the rows of their prompts, on the CPU; samples by number in the run."""

    def __init__(self, trainee: Trainee, places: list[Place], folder: PairFolder, seed: int) -> None:
        """Encodes them. ValueError when nothing in the folder can be read, or it is too large for the memory."""
        self.folder, self.seed = folder, seed
        self._width = _context_width(trainee, places)
        self._check_memory(trainee)
        process = trainee.model.get_model_object("latent_format").process_in

        def latent(image: Tensor | None) -> Tensor | None:
            mm.throw_exception_if_processing_interrupted()
            if image is None:
                return None
            return process(trainee.vae.encode(image.movedim(0, -1)[None]))[0].float().cpu()

        self.targets = {each.path: latent(folder.target(each)) for each in folder.targets}
        self.cut_outs = {each.path: latent(folder.cut_out(each)) for each in folder.cut_outs}
        self.rows: dict[str, Tensor] = {}
        for image in folder.targets:
            for text in (image.caption, subject_prompt(image.class_noun)):
                if text not in self.rows:
                    mm.throw_exception_if_processing_interrupted()
                    self.rows[text] = self._encode(trainee.clip, text)
        self.sample(0)

    def sample(self, number: int) -> Sample:
        """The one with this number in the run. ValueError when no pair of the folder can be read."""
        image, latent, subjects = self.folder.drawn(
            index_of(self.seed, number, len(self.folder)),
            pair_generator(self.seed, number),
            lambda each: self.targets[each.path],
            lambda each: self.cut_outs[each.path],
        )
        about = self.rows[subject_prompt(image.class_noun)].expand(len(subjects), -1, -1)
        return Sample(*detached([latent, self.rows[image.caption], torch.stack(subjects), about]))

    def conditioning(self) -> Conditioning:
        """One of the prompts, for a session to begin with."""
        return [[next(iter(self.rows.values()))[None], {}]]

    def _encode(self, clip: Any, text: str) -> Tensor:
        """[77, d]: a longer text is cut off there, as in the published training; brackets are no weights."""
        plain = text.replace("\\", " ").replace("(", "\\(").replace(")", "\\)")
        tokens = clip.tokenize(plain)
        rows = clip.encode_from_tokens({name: chunks[:1] for name, chunks in tokens.items()})[0].float().cpu()
        if rows.shape != (CHUNK, self._width):
            raise ValueError(
                f"The text encoder gives {rows.shape[0]} rows of width {rows.shape[1]}, the model takes {CHUNK} of "
                f"{self._width}: connect the CLIP of the model's own checkpoint."
            )
        return rows

    def _check_memory(self, trainee: Trainee) -> None:
        folder, cells = self.folder, (self.folder.size // trainee.vae.spacial_compression_encode()) ** 2
        channels = trainee.model.get_model_object("latent_format").latent_channels
        prompts = {each.caption for each in folder.targets} | {each.class_noun for each in folder.targets}
        images = len(folder.targets) + len(folder.cut_outs)
        needed = 4.0 * (images * channels * cells + len(prompts) * CHUNK * self._width)
        free = mm.get_free_memory(torch.device("cpu"))
        log.info("Adapter: encoding %d images and %d prompts (%.2f GB)", images, len(prompts), needed / GB)
        if needed > free:
            raise ValueError(
                f"{folder.path.name} would take {needed / GB:.1f} GB of memory once encoded, and {free / GB:.1f} GB "
                "are free: take a smaller folder, or train on large sets with the command-line trainer (see "
                "docs/train_adapter.md in the pack's repository)."
            )


def _context_width(trainee: Trainee, places: list[Place]) -> int:
    reader = trainee.model.model.diffusion_model.get_submodule(f"{places[0].module}.attn2.to_k")
    return reader.weight.shape[1]


def _memory(model: Any, places: list[Place], latent: Tensor, plan: Plan, batch: int) -> float:
    """Bytes that training needs beside what the gradient of one image through the bare UNet does."""
    weights = sum(4 * place.layer.width**2 for place in places)
    held = activations(model, latent, plan.checkpointing)
    return BYTES_PER_WEIGHT * weights + held * (batch * (1 + ADAPTER_SHARE * (1 + plan.max_subjects)) - 1)


class _Alone:
    """The UNet without the adapter, as a Network; no subject is looked at."""

    def __init__(self, network: UNet) -> None:
        self.network, self.alphas_cumprod = network, network.alphas_cumprod

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        return [z.new_zeros(len(z), 1, 1)]

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens | None) -> Tensor:
        return self.network.bare_noise(z, timestep, context)


@torch.no_grad()
def errors_of(network: UNet, sample: Callable[[int], Sample], seed: int) -> list[float]:
    """The mean error by the model alone, with the adapter but no subject, and with the subject.

    Of the first samples of the run, at timesteps spread evenly, all three with the same noise.
    """
    total = torch.zeros(3)
    for number in range(CHECKED):
        chosen, timestep = sample(number), (2 * number + 1) * TIMESTEPS // (2 * CHECKED)
        missing, shown, alone = (
            Draw(timestep, dropped, step_generator(seed, number, "adapter check")) for dropped in (True, False, False)
        )
        with_adapter = errors(network, [chosen, chosen], [missing, shown])
        total += torch.cat([errors(_Alone(network), [chosen], [alone]), with_adapter]).cpu()
    return (total / CHECKED).tolist()


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _as_text(stored: Tensor) -> str:
    return bytes(stored.tolist()).decode()


def _header(
    trainee: Trainee, plan: Plan, settings: TrainingSettings, folder: PairFolder, steps: int, losses: list[float]
) -> dict[str, Any]:
    before = 0 if trainee.start is None else int(trainee.start.header.get("steps", 0))
    images = {"size": plan.size, "max_subjects": plan.max_subjects, "pictures": len(folder)}
    return {
        "method": METHOD,
        "base": base_sample(trainee.model),
        "steps": before + steps,
        "settings": {**asdict(settings), **images, "steps": steps},
        "losses": curve(losses),
    }

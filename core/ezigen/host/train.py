"""Train EZIGen's adapter in a MODEL on a folder of images: from the node's inputs to a LIKENESS_ADAPTER.

The latents of all images and the token embeddings of all prompts are computed once and stored on the CPU. A step then
runs the UNet only, once for the subject images and once, with a gradient, for the target image.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import comfy.model_management as mm
import torch
from torch import Tensor

from ...fit.fit import step_generator
from ...fit.runs import RunStore, digest
from ...fit.train import Result, Retention
from ...prompt.conditioning import CHUNK, detached
from ...session.describe import describe
from ...session.fingerprint import patches_digest, precision
from ...session.images import check_vae
from ...session.job import LAST, Fitted, Job, run
from ...session.memory import BYTES_PER_WEIGHT, GB, activations
from ...session.session import GuiderDenoiser, Session
from ...session.stores import dedicated_store
from ..adapter import Adapter
from ..artifact import StoredAdapter, pack_adapter
from ..subject_pairs import PairFolder, index_of, pair_generator, subject_prompt
from ..train import TIMESTEPS, AdapterTraining, Draw, Sample, TrainingSettings, errors
from .adapter import check_model, model_base_sample
from .layers import Place, UNet, has_quantised_attention, new_adapter

RUN_BYTES_PER_WEIGHT = 16  # weight, two moments, and the result, in float32
KEPT_RUNS = 3.5
CHECKED = 10  # samples for the report's errors
CHECK_ERRORS, FOLDER_REPORT = "worth", "left out"  # entries of a result besides the adapter
ADAPTER_SHARE = 0.15  # of a block's activations, for each subject image that its adapter reads
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class AdapterJob(Job):
    """A complete adapter training: the MODEL with its CLIP and VAE, a folder of images, whose size is that of all
    images, and the adapter to start from, if any. ValueError, before anything is loaded, for inputs that do not fit.
    """

    method: ClassVar[str] = "ezigen"

    model: Any
    clip: Any
    vae: Any
    folder: PairFolder
    settings: TrainingSettings = TrainingSettings()
    steps: int = 1000
    checkpointing: bool = False
    start: StoredAdapter | None = None
    retention = Retention(LAST, 1)

    def __post_init__(self) -> None:
        places, unet = self.places, self.model.model.diffusion_model
        if unet.num_classes is not None:
            raise ValueError(
                "This model wants a pooled vector beside the prompt's rows, as SDXL does; the adapter is trained for "
                "SD2.1-base and SD1.x: connect one of these."
            )
        if has_quantised_attention(self.model, places):
            raise ValueError(
                "The model's attention is quantised (GGUF, int8, 4 bit or scaled fp8), and an adapter starts as a copy "
                "of it: load the model in fp16, bf16 or fp32."
            )
        channels = self.model.get_model_object("latent_format").latent_channels
        if unet.in_channels != channels:
            raise ValueError(
                f"The UNet takes {unet.in_channels} channels and its latents have {channels}: this is a model for "
                "inpainting. Connect the plain one."
            )
        check_vae(self.model, self.vae)
        cell = self.vae.spacial_compression_encode()
        if self.folder.size % cell:
            raise ValueError(f"The images' size is {self.folder.size}: give a multiple of {cell}.")
        if self.start is not None:
            with torch.device("meta"):
                Adapter([place.layer for place in places]).check(self.start.tensors)

    @functools.cached_property
    def places(self) -> list[Place]:
        """The blocks that get the adapter."""
        return check_model(self.model)

    def key(self) -> str:
        model, clip, folder = self.model, self.clip, self.folder
        base = [self.base, patches_digest(model), precision(model), precision(clip.patcher)]
        encoder_parts = describe([self.vae.patcher, clip.patcher, clip.layer_idx, clip.tokenizer_options])
        training = [asdict(self.settings), folder.size, folder.max_subjects, str(self.vae.vae_dtype)]
        start = None if self.start is None else self.start.tensors
        return digest([self.method, training, base, encoder_parts, folder.state(), start])

    def store(self) -> RunStore:
        """A separate folder, so that these runs do not displace smaller ones; it keeps the newest three."""
        count = sum(4 * place.layer.width**2 + 3 * place.layer.width + 1 for place in self.places)
        return dedicated_store("adapter_runs", RUN_BYTES_PER_WEIGHT * count, KEPT_RUNS)

    @functools.cached_property
    def data(self) -> EncodedFolder:
        """The folder's latents and prompts; made once, when the session begins."""
        return EncodedFolder(self)

    def session(self) -> Session:
        model, cells = self.model, self.folder.size // self.vae.spacial_compression_encode()
        latent = torch.zeros(1, model.get_model_object("latent_format").latent_channels, cells, cells)
        # In addition to the gradient of one image through the bare UNet.
        weights = sum(4 * place.layer.width**2 for place in self.places)
        passes = self.settings.batch * (1 + ADAPTER_SHARE * (1 + self.folder.max_subjects)) - 1
        more = BYTES_PER_WEIGHT * weights + activations(model, latent, self.checkpointing) * passes
        prompt = [[next(iter(self.data.rows.values()))[None], {}]]  # any one
        return Session(model, prompt, latent, checkpointing=self.checkpointing, more_memory=more)

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        base: Any = denoiser.model
        adapter = new_adapter(base)
        if self.start is not None:
            adapter.load(self.start.tensors)
        network, folder_report = UNet(base, adapter.to(x0.device)), list(self.folder.describe().encode())

        def sample(number: int) -> Sample:
            return Sample(*(part.to(x0.device) for part in vars(self.data.sample(number)).values()))

        def result() -> Result:
            check_errors = torch.tensor(mean_errors(network, UNet(base, None), sample, self.settings.seed))
            about = torch.tensor(folder_report, dtype=torch.uint8)
            return {**pack_adapter(adapter, {}).tensors, CHECK_ERRORS: check_errors, FOLDER_REPORT: about}

        return AdapterTraining(network, adapter, lambda numbers: list(map(sample, numbers)), self.settings), result

    def header(self, steps: int, losses: list[float]) -> dict[str, Any]:
        folder, before = self.folder, 0 if self.start is None else int(self.start.header.get("steps", 0))
        images = {"size": folder.size, "max_subjects": folder.max_subjects, "pictures": len(folder)}
        settings, base = {**asdict(self.settings), **images, "steps": steps}, model_base_sample(self.model)
        return self.artifact_header(settings, losses, base=base, steps=steps + before)


def train_adapter(job: AdapterJob) -> tuple[StoredAdapter, list[float], str]:
    """Train (or resume, or load from disk); returns the adapter, all losses, and a report for the user: the data used,
    the course of the loss, and the error with and without the subject.
    """
    job_run = run(job)
    losses, result = job_run.losses, dict(job_run.last)
    bare, without_subject, with_subject = result.pop(CHECK_ERRORS).tolist()
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    lines = [
        bytes(result.pop(FOLDER_REPORT).tolist()).decode(),
        f"{job_run.step} steps of {job.settings.batch}: mean loss of the first tenth {first:.5f}, of the last "
        f"{last:.5f}",
        f"error on {CHECKED} samples of the folder: {with_subject:.5f} with the subject, {without_subject:.5f} with "
        f"the adapter but no subject, {bare:.5f} by the model alone",
    ]
    if with_subject >= without_subject:
        lines.append("The subject's images do not help yet: train longer.")
    elif with_subject >= bare:
        lines.append("The adapter uses the subject's images, and is not yet better than the model alone: train on.")
    return StoredAdapter(result, job.header(job_run.step, losses)), losses, "\n".join(lines)


class EncodedFolder:
    """Latents of a folder's images and token embeddings of their prompts, on the CPU; samples by number in the run."""

    def __init__(self, job: AdapterJob) -> None:
        """Encode the folder. ValueError when nothing in it can be read, or it does not fit into memory."""
        folder, self.seed = job.folder, job.settings.seed
        self.folder = folder
        reader = job.model.model.diffusion_model.get_submodule(f"{job.places[0].module}.attn2.to_k")
        self._width = reader.weight.shape[1]
        self._check_memory(job)
        process = job.model.get_model_object("latent_format").process_in

        def latent(image: Tensor | None) -> Tensor | None:
            mm.throw_exception_if_processing_interrupted()
            if image is None:
                return None
            return process(job.vae.encode(image.movedim(0, -1)[None]))[0].float().cpu()

        self.targets = {each.path: latent(folder.read(each, False)) for each in folder.targets}
        self.cut_outs = {each.path: latent(folder.read(each, True)) for each in folder.cut_outs}
        self.rows: dict[str, Tensor] = {}
        for image in folder.targets:
            for text in (image.caption, subject_prompt(image.class_noun)):
                if text not in self.rows:
                    mm.throw_exception_if_processing_interrupted()
                    self.rows[text] = self._encode(job.clip, text)
        self.sample(0)

    def sample(self, number: int) -> Sample:
        """The sample with this number in the run. ValueError when no pair of the folder can be read."""
        image, latent, subjects = self.folder.draw(
            index_of(self.seed, number, len(self.folder)),
            pair_generator(self.seed, number),
            lambda each, cut: (self.cut_outs if cut else self.targets)[each.path],
        )
        noun_rows = self.rows[subject_prompt(image.class_noun)].expand(len(subjects), -1, -1)
        return Sample(*detached([latent, self.rows[image.caption], torch.stack(subjects), noun_rows]))

    def _encode(self, clip: Any, text: str) -> Tensor:
        """[77, d]: longer texts are truncated, as in the published training; brackets do not set weights."""
        escaped = text.replace("\\", " ").replace("(", "\\(").replace(")", "\\)")
        tokens = clip.tokenize(escaped)
        rows = clip.encode_from_tokens({name: chunks[:1] for name, chunks in tokens.items()})[0].float().cpu()
        if rows.shape != (CHUNK, self._width):
            raise ValueError(
                f"The text encoder gives {rows.shape[0]} rows of width {rows.shape[1]}, the model takes {CHUNK} of "
                f"{self._width}: connect the CLIP of the model's own checkpoint."
            )
        return rows

    def _check_memory(self, job: AdapterJob) -> None:
        folder, cells = self.folder, (self.folder.size // job.vae.spacial_compression_encode()) ** 2
        channels = job.model.get_model_object("latent_format").latent_channels
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


@torch.no_grad()
def mean_errors(network: UNet, bare_network: UNet, sample: Callable[[int], Sample], seed: int) -> list[float]:
    """The mean errors of the model alone, with the adapter but no subject, and with the subject.

    Over the first samples of the run, at evenly spaced timesteps, all three with the same noise.
    """
    total = torch.zeros(3)
    for number in range(CHECKED):
        example, timestep = sample(number), (2 * number + 1) * TIMESTEPS // (2 * CHECKED)
        without_subject, with_subject, bare = (
            Draw(timestep, dropped, step_generator(seed, number, "adapter check")) for dropped in (True, False, False)
        )
        adapter_errors = errors(network, [example, example], [without_subject, with_subject])
        total += torch.cat([errors(bare_network, [example], [bare]), adapter_errors]).cpu()
    return (total / CHECKED).tolist()

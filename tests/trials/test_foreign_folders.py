"""Folders and files of other programs with odd settings: a result or a sentence of the pack's own, in little memory."""

from __future__ import annotations

import copy
import functools
import json
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import inprocess

inprocess.start()
from likeness.core.sana.host import diffusers_folder as sana  # noqa: E402
from likeness.core.vision.host.extras import caption, grounding, sam, transformers_folder  # noqa: E402
from likeness.core.vision.host.vision import embed, load_vision  # noqa: E402

from .. import tiny_sana  # noqa: E402
from ..vision import finders, models  # noqa: E402
from .forms import NAN  # noqa: E402

ROOT = Path(__file__).parents[2]
ODD: dict[str, Any] = {
    "zero": 0, "negative": -1, "huge": 20_000, "beyond": 10**9, "half": 1.5, "a text": "abc", "true": True,
    "an empty list": [], "a nested list": [[1]], "two zeros": [0, 0], "an empty table": {}, "NaN": NAN,
    "beyond all": 10**400, "a table of texts": {"height": "x", "shortest_edge": "x"},
    "a table below zero": {"height": -5, "width": -5, "shortest_edge": -5},
}  # fmt: skip
TEXTS = ("", "[]", "3", "null", "{", '"x"', "[" * 50_000, '{"a": 1e999}', "\ud800")
ROOM = 96 << 20  # bytes that a library itself may take; what is refused here took from 300 MB to 5 GB
IMAGE = (models.pictures(1, 48, 64)[0] * 255).byte().numpy()


def finite(values: torch.Tensor) -> None:
    assert bool(torch.isfinite(values.float()).all()), "a result without a number"


def see(folder: Path) -> None:
    finite(embed(load_vision(folder), models.pictures(1)))


def detect(folder: Path) -> None:
    detector = grounding.load_detector(folder)
    detector.check("dog")
    with torch.no_grad():
        finite(detector(IMAGE, "dog", 0.3, 0.3).scores)


def describe(folder: Path) -> None:
    with torch.no_grad():
        caption.load_captioner(folder, torch.float32)(IMAGE, 4)


def draw(folder: Path) -> None:
    with torch.inference_mode():
        sana.check_folder(folder)
        network = sana.load_network(folder, torch.float32)
        context = torch.randn(1, 3, tiny_sana.CAPTION, generator=torch.Generator().manual_seed(0))
        finite(network(torch.ones(1, tiny_sana.CHANNELS, 2, 2), torch.ones(1), context))
        autoencoder = sana.load_autoencoder(folder, torch.float32)
        finite(autoencoder.decode(torch.ones(1, tiny_sana.CHANNELS, 1, 1)))
        assert sana.noise_shift(folder) > 0 and sana.latent_spec(folder)[0] > 0


FOLDERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], None]]] = {
    "clip": (models.clip_folder, see),
    "dino": (models.dino_folder, see),
    "open_clip": (models.open_clip_file, see),
    "grounding": (finders.grounding_dino_folder, detect),
    "captions": (finders.blip_folder, describe),
    "sana": (tiny_sana.write, draw),
}
FILES = {
    "clip": ("preprocessor_config.json", "config.json"),
    "dino": ("preprocessor_config.json", "config.json"),
    "open_clip": ("open_clip_config.json",),
    "grounding": ("processor_config.json",),
    "captions": ("processor_config.json",),
    "sana": ("scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"),
}
ONCE = {  # what reads the weights beside a file without looking at it
    "preprocessor_config.json": ((transformers_folder, "read_model"),),
    "processor_config.json": ((caption, "read_model"), (grounding, "read_model")),
    "scheduler/scheduler_config.json": ((sana, "load_network"), (sana, "load_autoencoder")),
    "vae/config.json": ((sana, "load_network"),),
}
UNREAD = ("_diffusers_version", "transformers_version", "architectures", "initializer_range", "initializer_factor")
REFUSED = {  # each odd value of these
    "clip": ("size", "crop_size", "image_mean", "image_std"),
    "sana": ("shift", "num_layers", "norm_eps", "attention_bias", "scaling_factor", "timestep_scale"),
}
READ = {name for names in REFUSED.values() for name in names}
FEW = ("zero", "huge", "a text", "an empty list", "NaN")
ALLOWED = {"sana": ("half", "huge", "beyond")}  # a shift, a factor


def entries(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in table.items():
        if name not in UNREAD:
            yield (*path, name)
            if isinstance(value, dict):
                yield from entries(value, (*path, name))


def changed(table: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    table = copy.deepcopy(table)
    inner = table
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return table


def tried(use: Callable[[], None]) -> str:
    """What is wrong with what happened; "refused" and nothing are right."""
    try:
        use()
    except ValueError as error:
        own = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ROOT)
        right = own and ": " in str(error) and str(error).isascii() and len(str(error)) < 700
        return "refused" if right else f"not a sentence of ours: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def cases(usual: str, each: int) -> Iterator[tuple[str, str, str]]:
    """(entry, form, text of the file). each: so many of FEW for an entry, by turns."""
    for text in TEXTS:
        yield "the file", ascii(text)[:20], text
    table, few = json.loads(usual), FEW
    for path in entries(table):
        if "use_karras_sigmas" in table and path[-1] not in READ:
            continue  # of a scheduler, which is not built
        for form in ODD if path[-1] in READ else few[:each]:
            yield path[-1], form, json.dumps(changed(table, path, ODD[form]))
        few = few[each:] + few[:each]


@pytest.mark.parametrize("each", [2, pytest.param(len(FEW), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_odd_settings_give_a_result_or_a_sentence(kind, name, each, tmp_path, monkeypatch):
    make, use = FOLDERS[kind]
    folder = tmp_path / "model"
    make(folder)
    for module, function in ONCE.get(name, ()):
        monkeypatch.setattr(module, function, functools.cache(getattr(module, function)))
    use(folder)
    usual, before, bad = (folder / name).read_text(), peak(), []
    for entry, form, text in cases(usual, each):
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        found = tried(lambda: use(folder))
        if found == "" and entry in REFUSED.get(kind, ()) and form not in ALLOWED.get(kind, ()):
            found = "accepted"
        if found not in ("", "refused"):
            bad.append(f"{entry}, {form}: {found}")
        if peak() - before > ROOM:
            bad.append(f"{entry}, {form}: {(peak() - before) >> 20} MB")
            before = peak()
    (folder / name).write_text(usual)
    use(folder)
    assert not bad, "\n".join(bad)


def test_a_huge_file_of_settings_is_not_read(tmp_path):
    models.dino_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"a": [[0]] * (1 << 20)}))
    before = peak()
    with pytest.raises(ValueError, match=r"preprocessor_config.json of .* cannot be read \(it has 5.0 MB\): copy it"):
        see(tmp_path)
    assert peak() - before < 20 << 20


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return finders.sam_file(tmp_path_factory.mktemp("sams") / "sam_vit_b.safetensors").state_dict()


POSITIONS = sam.VARIANT_KEY
SAMS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "nothing": lambda _: {},
    "a list": lambda _: [1],
    "a table in a table": lambda state: {"model": dict(state)},
    "one tensor": lambda _: {POSITIONS: torch.zeros(1, 64, 64, 1280)},
    "no grid": lambda state: {**state, POSITIONS: torch.zeros(768)},
    "another grid": lambda state: {**state, POSITIONS: torch.zeros(1, 2, 2, 768)},
    "an empty grid": lambda state: {**state, POSITIONS: torch.zeros(0, 64, 64, 768)},
    "a number": lambda state: {**state, POSITIONS: 5},
    "whole numbers": lambda state: {**state, POSITIONS: state[POSITIONS].int()},
    "complex numbers": lambda state: {**state, POSITIONS: state[POSITIONS].to(torch.complex64)},
    "sparse": lambda state: {**state, POSITIONS: state[POSITIONS].to_sparse()},
    "NaN": lambda state: {**state, POSITIONS: state[POSITIONS] * NAN},
    "a view of one number": lambda state: {**state, POSITIONS: torch.zeros(1).expand(1, 4000, 4000, 768)},
}


@pytest.mark.parametrize("form", SAMS)
def test_odd_files_of_segment_anything_are_refused_with_a_sentence(form, segmenter, tmp_path):
    path = tmp_path / "sam.pth"
    torch.save(SAMS[form](segmenter), path)
    before = peak()
    assert tried(lambda: sam.load_sam(path) and None) == "refused"
    assert peak() - before < 4 * path.stat().st_size + ROOM

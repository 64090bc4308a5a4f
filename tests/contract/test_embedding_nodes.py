"""The four embedding nodes: previews, files, real text encoders, and what bad input gets."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models
from .methods import run_node
from .setting import SharedSetting as Setting


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    import folder_paths

    folder_paths.set_user_directory(str(tmp_path / "user"))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "likeness_embeddings", ([str(tmp_path / "embeddings")], set())
    )


def train(setting: Setting, **changes) -> tuple:
    from likeness.nodes.embedding import LikenessTrainEmbedding

    inputs = {
        "model": setting.model,
        "positive": setting.source,
        "steps": 4,
        "learning_rate": 0.01,
        "tokens": 5,
        "save_every": 2,
        "init": "source prompt",
        "seed": 0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "preview_steps": 2,
        "preview_cfg": 3.0,
        "latent": setting.latent,
    }
    return run_node(LikenessTrainEmbedding, **{**inputs, **changes})


def picture(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 64, 64, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def any_cost(monkeypatch):
    """Previews may cost as much as they like, or what the test says."""
    from likeness.core.embedding.host import train

    monkeypatch.setattr(train, "PREVIEW_SHARE", 1e9)
    return lambda share: monkeypatch.setattr(train, "PREVIEW_SHARE", share)


@pytest.mark.usefixtures("any_cost")
def test_previews_are_target_alone_then_source_and_target_for_each_saved_step():
    setting, vae = Setting(), tiny_models.taesd()
    embedding, loss, previews = train(setting, vae=vae, target=setting.target, negative=setting.empty)
    assert sorted(embedding.rows) == [2, 4] and len(loss["loss"]) == 4
    assert previews.shape == (5, 64, 64, 3) and len({float(p.sum()) for p in previews}) == 5
    _, _, alone = train(setting, vae=vae)
    assert alone.shape == (2, 64, 64, 3)


def test_previews_cost_a_small_share_of_the_training(any_cost):
    """Left out first are earlier steps, then the target alone, then the source; with guidance each takes 4 calls."""
    setting, vae = Setting(), tiny_models.taesd()
    inputs = {"vae": vae, "target": setting.target, "negative": setting.empty}
    all_of_them = train(setting, **inputs)[2]
    last = {3: [0, 3, 4], 2: [3, 4], 1: [4]}
    for images, kept in last.items():
        any_cost(4.4 * images / (2.2 * 4))
        assert torch.equal(train(setting, **inputs)[2], all_of_them[kept]), images
    any_cost(0.04)
    assert torch.equal(train(setting, **inputs)[2], all_of_them[[4]]), "one is always made"
    assert train(setting, vae=vae)[2].shape[0] == 1


@pytest.mark.usefixtures("any_cost")
def test_previews_are_of_few_steps_and_kept_with_the_run(monkeypatch):
    import comfy.sample

    setting, vae, sampled = Setting(), tiny_models.taesd(), []
    original = comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *a, **k: sampled.append(1) or original(*a, **k))
    inputs = {"vae": vae, "target": setting.target, "negative": setting.empty, "steps": 4, "save_every": 1}
    embedding, _, previews = train(setting, **inputs)
    assert len(embedding.rows) == 4 and previews.shape[0] == len(sampled) == 7
    assert torch.equal(train(setting, **inputs)[2], previews) and len(sampled) == 7
    assert not torch.equal(train(setting, **{**inputs, "preview_cfg": 2.0})[2], previews) and len(sampled) == 14


@pytest.mark.usefixtures("any_cost")
def test_learned_rows_can_be_learned_on_and_seen():
    """A source prompt that holds an embedding: its rows are where the training starts, and the previews show others."""
    from likeness.core.prompt.conditioning import apply_embedding

    setting, vae = Setting(), tiny_models.taesd()
    first = train(setting, vae=vae)[0].at(0)
    setting.source = apply_embedding(setting.source, first, 1.0)
    embedding, _, previews = train(setting, vae=vae)
    assert previews.shape == (2, 64, 64, 3) and not torch.equal(embedding.at(0), first)


def test_without_a_vae_or_with_no_preview_steps_nothing_runs_behind_previews():
    from comfy_execution.graph_utils import ExecutionBlocker

    assert isinstance(train(Setting())[2], ExecutionBlocker)
    assert isinstance(train(Setting(), vae=tiny_models.taesd(), preview_steps=0)[2], ExecutionBlocker)


def test_image_and_vae_learn_the_same_as_the_encoded_latent():
    vae = tiny_models.taesd()
    with torch.inference_mode():
        latent = {"samples": vae.encode(picture())}
    setting = Setting()
    setting.latent = latent
    encoded = train(setting)[0]
    direct = train(setting, latent=None, image=picture(), vae=vae)[0]
    assert all(torch.equal(encoded.rows[step], direct.rows[step]) for step in encoded.rows)


def test_a_real_text_encoder_tells_where_the_prompt_ends(caplog):
    """Not only our own idea of a pooled vector: ComfyUI's tokenizer and text model, weights and a long prompt
    included.
    """
    from likeness.core.prompt.conditioning import check_room, padding_rows

    clip = tiny_models.clip_l()

    def encode(text: str) -> list:
        with torch.inference_mode():
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    words = {"": 0, "a photo of a cat": 5, "a (red:1.3) cat": 3, " ".join(["cat"] * 68): 68, " ".join(["cat"] * 75): 75}
    for text, tokens in words.items():
        rows, options = encode(text)[0]
        assert padding_rows(rows, options["pooled_output"]) == 75 - tokens, text
    check_room(encode(" ".join(["cat"] * 90)), 5)
    assert "cannot be told" in caplog.text
    with pytest.raises(ValueError, match="only 1 unused"):
        check_room(encode(" ".join(["cat"] * 74)), 5)


def test_init_from_the_empty_prompt():
    setting = Setting()
    first = train(setting, steps=1, learning_rate=1e-6, init="empty prompt", negative=setting.empty)[0]
    torch.testing.assert_close(first.at(1)[0], setting.empty[0][0][0, -5:], atol=1e-5, rtol=0)
    second = train(setting, steps=1, learning_rate=1e-6)[0]
    torch.testing.assert_close(second.at(1)[0], setting.source[0][0][0, -5:], atol=1e-5, rtol=0)


def test_a_preset_is_the_same_as_its_settings_on_the_node(monkeypatch, caplog):
    """To the byte, under the same key: what was trained is served for either. As set is the run of older graphs."""
    from likeness.core.session.session import Session

    short = {"steps": 3, "learning_rate": 0.03, "tokens": 4, "anchor_weight": 0.0}
    rows: list[torch.Tensor] = []
    presets = {"fast": {"noise": short}}
    monkeypatch.setattr("likeness.nodes.embedding.presets_for", lambda given: rows.append(given) or presets)
    caplog.set_level("INFO")
    setting = Setting()
    named = train(setting, **short)[0]
    monkeypatch.setattr(Session, "run", None)
    served = train(setting, preset="fast", anchor_weight=0.5, steps=4)[0]
    assert torch.equal(served.at(3), named.at(3)) and served.header == named.header
    assert "Preset 'fast' sets steps 3, learning_rate 0.03, tokens 4" in caplog.text
    assert all(torch.equal(each, setting.source[0][0]) for each in rows) and rows
    assert torch.equal(train(setting, preset="as set", **short)[0].at(3), named.at(3))


def test_fast_takes_its_rate_on_a_flow_model_from_the_prompt(monkeypatch):
    from likeness.core.embedding.presets import FAST_HIPER

    monkeypatch.setitem(FAST_HIPER, "steps", 2)
    setting = Setting("flux")
    setting.source[0][0].mul_(20)
    settings = train(setting, preset="fast", preview_steps=0)[0].header["settings"]
    assert settings["learning_rate"] == pytest.approx(0.6, rel=0.05) and settings["steps"] == 2


def test_a_rate_at_which_the_loss_rises_is_said_and_the_run_goes_on(monkeypatch, caplog):
    from likeness.core.fit import train as training

    setting = Setting()
    monkeypatch.setattr(training, "LOOK", 2)
    monkeypatch.setattr(training, "rises", lambda losses: len(losses) >= 4)
    embedding = train(setting, steps=8, preview_steps=0)[0]
    assert sorted(embedding.rows) == [2, 4, 6, 8]
    assert caplog.text.count("The loss rises: learning_rate is 0.01, the preset 'fast' has ") == 1


REFUSED = {
    "no image": ({"latent": None}, "Connect either a LATENT, or an IMAGE"),
    "two images": ({"image": picture()}, "both came in"),
    "image without vae": ({"latent": None, "image": picture()}, "without a VAE"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
    "masks of another batch size": ({"mask": torch.ones(2, 64, 64)}, "2 masks came with 1 images"),
    "latent of another model": ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, "use its own VAE"),
    "video latent": ({"latent": {"samples": torch.zeros(1, 4, 3, 8, 8)}}, "use its own VAE"),
    "nan latent": ({"latent": {"samples": torch.full((1, 4, 8, 8), float("nan"))}}, "NaN or infinite"),
    "more tokens than room": ({"tokens": 75, "positive": tiny_models.prompt("sd1", 1, end=9)}, "leaves only 67 unused"),
    "prompt for another model": ({"positive": tiny_models.prompt("sdxl", 1)}, "another model family"),
    "target for another model": ({"target": tiny_models.prompt("sdxl", 1)}, "another model family"),
    "target without room": ({"target": tiny_models.prompt("sd1", 1, end=74)}, "only 2 unused"),
    "two prompts": ({"positive": tiny_models.prompt("sd1", 1) * 2}, "2 prompts, expected one"),
    "empty prompt missing": ({"init": "empty prompt"}, "connect the empty prompt"),
    "empty window": ({"start_percent": 0.6, "end_percent": 0.4}, "start below the end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_work_starts(name, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(Setting(), **changes)
    assert not list(tmp_path.glob("user/likeness/runs/*"))


def test_a_model_that_does_not_fit_is_refused():
    from likeness.core.session.weights import check_fully_loaded

    model = tiny_models.sd1()
    check_fully_loaded(model)
    model.model.model_lowvram = True
    with pytest.raises(RuntimeError, match="does not fit whole.*smaller image"):
        check_fully_loaded(model)


def test_streamed_weights_are_reloaded_or_refused():
    """What newer ComfyUI's dynamic VRAM needs; here only its interface is played, the real thing needs a GPU."""
    from likeness.core.session.weights import trainable_clone

    class Dynamic:
        model_options: dict = {}
        load_device = torch.device("cpu")

        def __init__(self, loader: bool):
            self.loader, self.asked = loader, None

        def is_dynamic(self):
            return True

        def model_dtype(self):
            return torch.float32

        def clone(self, **how):
            self.asked = how
            if not self.loader:
                raise RuntimeError("cached_patcher_init is not initialized")
            return tiny_models.sd1()

    model = Dynamic(loader=True)
    trainable_clone(model)
    assert model.asked == {"disable_dynamic": True, "force_deepcopy": True}
    with pytest.raises(RuntimeError, match="Load Checkpoint, or start ComfyUI with --disable-dynamic-vram"):
        trainable_clone(Dynamic(loader=False))


def test_save_and_load_nodes(tmp_path):
    from likeness.nodes.embedding import LikenessLoadEmbedding, LikenessSaveEmbedding

    embedding = train(Setting(), preview_steps=0)[0]
    _, name = run_node(LikenessSaveEmbedding, embedding=embedding, filename_prefix="cats/tom")
    assert name == "cats/tom_00001_.safetensors" and (tmp_path / "embeddings" / name).is_file()
    assert (
        run_node(LikenessSaveEmbedding, embedding=embedding, filename_prefix="cats/tom")[1]
        == "cats/tom_00002_.safetensors"
    )
    loaded, info = run_node(LikenessLoadEmbedding, name=name)
    assert all(torch.equal(loaded.rows[step], embedding.rows[step]) for step in embedding.rows)
    assert "hiper: 5 tokens of width 768" in info and "SD15" in info


HOSTILE = [
    "../out",
    "a/../../out",
    "/abs",
    "C:\\out",
    "\\\\server\\share",
    "nul\0byte",
    "",
    "x" * 300,
    "..",
    "link/out",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_write_and_read_nothing(name, tmp_path):
    from likeness.core.embedding.artifact import Embedding
    from likeness.nodes.embedding import LikenessLoadEmbedding, LikenessSaveEmbedding

    (tmp_path / "embeddings").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "embeddings" / "link").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="plain name|leads outside"):
        run_node(LikenessSaveEmbedding, embedding=Embedding({1: torch.zeros(1, 5, 768)}), filename_prefix=name)
    assert sorted(tmp_path.rglob("*.safetensors")) == before
    with pytest.raises((ValueError, FileNotFoundError)):
        run_node(LikenessLoadEmbedding, name=f"{name}.safetensors")


def test_a_single_loss_is_drawn_too():
    """The stock graph divides by the span of the losses."""
    from likeness.core.session.outputs import loss_map

    for losses in ([0.5], [-1.0, -1.0], [0.0]):
        drawn = loss_map(losses)["loss"]
        assert drawn[: len(losses)] == losses and max(drawn) > min(drawn)
    assert loss_map([2.0, 1.0]) == {"loss": [2.0, 1.0]}


def test_every_node_has_aliases_of_its_own_and_those_that_people_type(monkeypatch):
    """Whether or not this ComfyUI knows the field."""
    import asyncio

    from likeness.nodes import LikenessExtension
    from likeness.nodes import node as shared

    monkeypatch.setattr(shared, "_KNOWN", {*shared._KNOWN, "search_aliases"})
    monkeypatch.setattr(shared.io, "Schema", lambda **fields: fields)
    for node in asyncio.run(LikenessExtension().get_node_list()):
        aliases = node.define_schema()["search_aliases"]
        assert set(aliases) >= set(shared.TYPED) and len(set(aliases)) > len(shared.TYPED), node.__name__


def test_where_the_end_of_a_prompt_cannot_be_told_apply_says_so_too(caplog):
    """A prompt of two tables: words may stand in its last tokens."""
    from likeness.nodes.embedding import LikenessApplyEmbedding

    setting = Setting()
    embedding = train(setting, preview_steps=0)[0]
    rows, options = setting.source[0]
    inputs = {"embedding": embedding, "scale": 0.8, "step": 0}
    caplog.clear()
    run_node(LikenessApplyEmbedding, conditioning=[[rows, options]], **inputs)
    assert "cannot be told" not in caplog.text
    run_node(LikenessApplyEmbedding, conditioning=[[torch.cat([rows, rows], 1), options]], **inputs)
    assert "this prompt of 154 tokens ends cannot be told" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    caplog.set_level("INFO", "likeness")
    padded = torch.cat([rows, rows, rows, rows[:, :25]], 1)  # as long as T5 makes a prompt of FLUX
    run_node(LikenessApplyEmbedding, conditioning=[[padded, options]], **inputs)
    assert "this prompt of 256 tokens ends" in caplog.text and caplog.records[-1].levelname == "INFO"


@pytest.mark.parametrize("none", [False, True])
def test_a_prompt_without_its_pooled_output_is_refused(none):
    setting = Setting("sdxl")
    rows, options = setting.source[0]
    others = {name: value for name, value in options.items() if name != "pooled_output"}
    bare = [[rows, {**others, "pooled_output": None} if none else others]]
    with pytest.raises(ValueError, match="'positive' has no pooled_output, expected with this model: connect"):
        train(setting, positive=bare, preview_steps=0)
    other = [[rows, {**options, "pooled_output": torch.zeros(1, 768)}]]
    with pytest.raises(ValueError, match="'positive' has a pooled_output of width 768, expected 1280: connect"):
        train(setting, positive=other, preview_steps=0)


def test_an_embedding_of_nan_gives_no_prompt():
    from likeness.core.embedding.artifact import Embedding
    from likeness.nodes.embedding import LikenessApplyEmbedding

    bad = Embedding({1: torch.full((1, 5, 768), float("nan"))})
    with pytest.raises(RuntimeError, match="'conditioning' came out with NaN"):
        run_node(LikenessApplyEmbedding, conditioning=Setting().source, embedding=bad, scale=1.0, step=0)


def test_an_empty_source_prompt_is_said(caplog):
    setting = Setting()
    train(setting, positive=tiny_models.prompt("sd1", 1, end=1), preview_steps=0)
    assert "The source prompt is empty" in caplog.text
    caplog.clear()
    train(setting, preview_steps=0)
    assert "The source prompt is empty" not in caplog.text


def test_a_photo_that_is_much_larger_than_any_model_is_warned_of(caplog):
    from likeness.core.session.images import ImageSource

    class Vae:
        def encode(self, images):
            return torch.zeros(1, 4, 8, 8)

    for side, said in ((1536, False), (2000, True)):
        caplog.clear()
        ImageSource(image=torch.zeros(1, 8, side, 3), vae=Vae()).encoded(Setting().model)
        assert (f"{side} x 8 pixels" in caplog.text) == said

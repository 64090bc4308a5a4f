"""EZIGen's adapter without ComfyUI: its formula, hidden places, stages, files, and a training that resumes exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from likeness.core.ezigen.adapter import (
    WEIGHTS,
    Adapter,
    Layer,
    SubjectTokens,
    batch_tokens,
    drop_subjects,
)
from likeness.core.ezigen.artifact import PARTS, StoredAdapter, read_adapter, save_adapter
from likeness.core.ezigen.staged import (
    Loops,
    background_of,
    invert_with_solver,
    published_factors,
    split,
)
from likeness.core.ezigen.train import AdapterTraining, Sample, TrainingSettings, draw, errors

NAMES = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2"]
LAYERS = [Layer(f"{name}.transformer_blocks.0", width, 2) for name, width in zip(NAMES, (8, 12, 8), strict=True)]


def adapter(seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    made = Adapter(LAYERS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    return made


def test_the_formula():
    made, h, features = adapter(), torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    table = {
        name: value.detach() for name, value in made.published_parameters().items() if name.startswith(LAYERS[0].name)
    }
    part = {name.removeprefix(f"{LAYERS[0].name}."): value for name, value in table.items()}
    n = torch.nn.functional.layer_norm(h, (8,), part["adapter_norm.weight"], part["adapter_norm.bias"], 1e-5)
    m = torch.cat([n, made.learnable_weights[0].detach() * features], 1)
    q, k, v = (x @ part[f"adapter.to_{name}.weight"].T for name, x in (("q", n), ("k", m), ("v", m)))
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[..., columns] @ k[..., columns].mT / math.sqrt(4), -1)
        heads.append(weights @ v[..., columns])
    wanted = n + torch.cat(heads, -1) @ part["adapter.to_out.0.weight"].T + part["adapter.to_out.0.bias"]
    tokens = SubjectTokens((features, *(torch.zeros(1, 4, w) for w in (12, 8))))
    torch.testing.assert_close(made(0, h, tokens).detach(), h + wanted)
    torch.testing.assert_close(made(0, h, tokens, strength=0.25).detach(), h + 0.25 * wanted)


def test_hidden_places_are_not_there_and_dropped_ones_are_zero():
    made, h = adapter(), torch.randn(2, 5, 8)
    captured = [torch.randn(3, tokens, width) for tokens, width in ((4, 8), (2, 12), (4, 8))]
    tokens = batch_tokens(captured, [1, 2])
    found = made(0, h, tokens).detach()
    first = batch_tokens([each[:1] for each in captured], [1])
    second = batch_tokens([each[1:] for each in captured], [2])
    torch.testing.assert_close(found[:1], made(0, h[:1], first).detach())
    torch.testing.assert_close(found[1:], made(0, h[1:], second).detach())
    assert batch_tokens(captured, [1, 1, 1]).present is None
    gone = made(0, h, drop_subjects(tokens, torch.tensor([True, False]))).detach()
    zero = made(0, h[:1], first.map(torch.zeros_like)).detach()
    torch.testing.assert_close(gone[:1], zero)
    torch.testing.assert_close(gone[1:], found[1:])


class TinyNetwork:
    """A Network whose prediction is its first channel's adapter on the image's cells."""

    def __init__(self, made: Adapter) -> None:
        self.adapter, self.asked = made, []
        self.alphas_cumprod = torch.linspace(0.999, 0.01, 1000)
        self.up = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def capture(self, z, timestep, context):
        h = z.flatten(2).mT @ self.up
        return [h, torch.zeros(len(z), 1, 12), h]

    def predicted_noise(self, z, timestep, context, tokens):
        self.asked.append(timestep.tolist())
        h = self.adapter(0, z.flatten(2).mT @ self.up + context.mean(1, keepdim=True), tokens)
        return (h @ self.up.T).mT.reshape(z.shape)


def sample(number: int) -> Sample:
    generator = torch.Generator().manual_seed(number % 3)
    shapes = ((4, 3, 3), (2, 8), (1 + number % 2, 4, 3, 3), (1 + number % 2, 2, 8))
    return Sample(*(torch.randn(shape, generator=generator) for shape in shapes))


def training(batch: int = 2) -> AdapterTraining:
    made, settings = adapter(), TrainingSettings(seed=4, batch=batch, learning_rate=1e-2)
    return AdapterTraining(TinyNetwork(made), made, lambda numbers: list(map(sample, numbers)), settings)


def test_training_lowers_the_loss_and_resumes_bit_for_bit():
    whole, first = training(), training()
    for _ in range(60):
        whole.update()
    assert sum(whole.losses[-20:]) < 0.8 * sum(whole.losses[:20])
    for _ in range(25):
        first.update()
    state = {name: value.clone() for name, value in first.state().items()}
    resumed = training()
    resumed.restore(state)
    for _ in range(35):
        resumed.update()
    assert resumed.losses == whole.losses
    assert all(map(torch.equal, resumed.parameters.values(), whole.parameters.values()))


def test_a_sample_is_the_same_in_every_batch_and_process():
    """Two halves of a batch have the mean loss of the whole: what is random depends on the sample's number alone."""
    network = TinyNetwork(adapter())
    numbers = [0, 1, 2, 3]

    def losses(chosen):
        return errors(network, [sample(n) for n in chosen], [draw(7, n, 0.5) for n in chosen]).detach()

    torch.testing.assert_close(losses(numbers), torch.cat([losses([0, 2]), losses([1, 3])])[[0, 2, 1, 3]])
    assert len({draw(7, n, 0.5).timestep for n in range(50)}) > 40
    share = sum(draw(7, n, 0.1).dropped for n in range(1000)) / 1000
    assert 0.07 < share < 0.13
    assert draw(7, 3, 0.1).timestep != draw(8, 3, 0.1).timestep


def test_appearance_steps():
    def appearance_steps(steps: int, ratio: float) -> int:
        return len(split(torch.arange(steps, -1, -1), ratio)[1]) - 1

    assert [appearance_steps(50, ratio) for ratio in (0.4, 0.5, 0.1, 0.9)] == [20, 25, 5, 45]
    assert [appearance_steps(10, ratio) for ratio in (0.45, 0.3, 0.7)] == [5, 3, 7]  # 0.7 * 10 < 7 in floats
    for ratio in (0.0, 1.0, -0.2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            appearance_steps(50, ratio)
    with pytest.raises(ValueError, match="leaves none"):
        appearance_steps(4, 0.9)
    sigmas = torch.arange(10.0, -1, -1)
    layout, appearance = split(sigmas, 0.4)
    assert layout.tolist() == list(range(10, 3, -1)) and appearance.tolist() == [4, 3, 2, 1, 0]


def test_renoising_keeps_the_signal_at_the_exact_level():
    assert published_factors(1.09392, 1.09392) == (1.0, 1.0)
    assert published_factors(1.09392, 1.1644) == pytest.approx((0.96563, 1.12437 / 1.09392), abs=2e-4)


def test_loops_and_backgrounds():
    loops = Loops()
    assert [loops.needs_another(done, 1.0) for done in range(5)] == [True, True, True, False, False]
    assert [done for done in range(12) if loops.needs_another(done, 0.5)][-1] == 8
    fixed = Loops(4, 4)
    assert fixed.needs_another(3, 1.0) and not fixed.needs_another(4, 0.0)
    with pytest.raises(ValueError, match="min_loops is 5 and max_loops 4"):
        Loops(5, 4)
    trajectory = list(range(21))
    assert background_of(trajectory, 0) == 19 and background_of(trajectory, 19) == 0
    assert background_of(trajectory, 0, published=True) == 20 and background_of(trajectory, 19, published=True) == 1


def test_the_solver_is_exact_where_the_prediction_of_the_picture_is_constant():
    clean, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    sigmas = torch.tensor([0.1, 0.3, 0.8, 1.2])
    found = invert_with_solver(lambda x, sigma: (x - clean) / sigma, clean + 0.1 * noise, sigmas)
    for sigma, x in zip(sigmas, found, strict=True):
        torch.testing.assert_close(x, clean + sigma * noise)


def tensors() -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in adapter().published_parameters().items()}


def base() -> dict[str, torch.Tensor]:
    """What else stands in a published checkpoint."""
    found = {f"{layer.name}.attn1.to_q.weight": torch.randn(layer.width, layer.width) for layer in LAYERS}
    return {**found, "conv_in.weight": torch.randn(4, 4, 3, 3)}


def test_every_published_layout_is_read(tmp_path, caplog):
    own, others = tensors(), base()
    without = {name: value for name, value in own.items() if name != WEIGHTS}
    save_file({**others, **own}, tmp_path / "file.safetensors")
    folder = tmp_path / "checkpoint-200000"
    folder.mkdir()
    save_file({**others, **without}, folder / "model.safetensors")
    save_file({**others, WEIGHTS: own[WEIGHTS]}, folder / "model_1.safetensors")
    torch.save({f"module.{name}": value for name, value in {**others, **own}.items()}, tmp_path / "file.bin")
    for path in (tmp_path / "file.safetensors", folder, tmp_path / "file.bin"):
        found = read_adapter(path)
        assert found.tensors.keys() == own.keys()
        assert all(torch.equal(value, own[name]) for name, value in found.tensors.items())
        assert found.order() == [layer.name for layer in LAYERS] and found.widths() == [8, 12, 8]
        assert found.header["base"] and set(found.header["base"]) <= set(others)
    assert "taken as 1" not in caplog.text
    (folder / "model_1.safetensors").unlink()
    assert torch.equal(read_adapter(folder).tensors[WEIGHTS], torch.ones(3))
    assert "taken as 1" in caplog.text


def test_saved_and_read_again(tmp_path):
    stored = StoredAdapter(tensors(), {"steps": 5, "base": {}})
    save_adapter(tmp_path / "own.safetensors", stored)
    found = read_adapter(tmp_path / "own.safetensors")
    assert found.header["steps"] == 5 and "5 steps" in found.describe()
    assert all(torch.equal(value, stored.tensors[name]) for name, value in found.tensors.items())
    save_adapter(tmp_path / "half.safetensors", stored, torch.float16)
    half = read_adapter(tmp_path / "half.safetensors").tensors
    assert half[WEIGHTS].dtype == torch.float32 and half[f"{LAYERS[0].name}.{PARTS[0]}"].dtype == torch.float16


def test_bad_files_are_refused(tmp_path):
    own = tensors()
    first = f"{LAYERS[0].name}.{PARTS[0]}"
    cases = [
        ("no adapter", base()),
        ("lacks", {name: value for name, value in own.items() if name != first}),
        ("expected", {**own, first: torch.randn(8, 4)}),
        ("expected", {**own, first: torch.tensor(1.0)}),
        ("NaN", {**own, first: own[first] * float("nan")}),
    ]
    for message, table in cases:
        path = tmp_path / "file.safetensors"
        save_file(table, path)
        with pytest.raises(ValueError, match=message):
            read_adapter(path)
        torch.save(table, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "file.pt")
    (tmp_path / "evil.bin").write_bytes(b"\x80\x04c__builtin__\neval\n.")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_adapter(tmp_path / "evil.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none of"):
        read_adapter(tmp_path / "empty")
    other = "down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    known = next(name.partition(".adapter")[0] for name in own if ".adapter." in name) + ".attn1.to_q.weight"
    for noted in ({"../x": [1.0]}, {other: [1.0]}, {known: []}, {known: ["1"]}, {known: [float("nan")]}, [known]):
        header = {"likeness": json.dumps({"kind": "adapter", "format": 1, "base": noted})}
        save_file(own, tmp_path / "header.safetensors", metadata=header)
        with pytest.raises(ValueError, match="damaged header"):
            read_adapter(tmp_path / "header.safetensors")


def test_an_adapter_of_other_widths_is_refused():
    made = adapter()
    own = tensors()
    with pytest.raises(ValueError, match="missing"):
        made.load({name: value for name, value in own.items() if name != WEIGHTS})
    wide = {**own, f"{LAYERS[0].name}.{PARTS[0]}": torch.zeros(16, 16)}
    with pytest.raises(ValueError, match="16 x 16"):
        made.load(wide)

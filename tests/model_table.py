"""The table of docs/models.md, what runs on which model, made of the tests that show it.

A cell says "tested" only where a test with that family exists; an entry without its test is an error. After a change:
`python toolbox/_load.py tests.model_table` writes both tables anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import tiny_families

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ROOT / "tests" / "contract"
UNETS = {"sd1": "SD1.x", "sd2_v": "SD2.x", "sdxl": "SDXL"}  # as the tests' settings and as people call them
TESTED, UNTESTED = "tested", "in principle"
MARK = "<!-- {}: made by tests/model_table.py -->"
PAGES = {"docs/models.md": "table of models", "README.md": "short table of models"}


@dataclass(frozen=True)
class Step:
    """each: the test that every family of transformers passes, but for `left`. unets: tests of UNets, as
    file::function, or the name of a method of the contract suite; all are needed, and of those with a bar between one.
    refused: why those that are left, or all transformers, cannot; says: what the refusal's sentence holds.
    """

    name: str
    nodes: str
    unets: tuple[str, ...]
    each: str = ""
    refused: str = ""
    says: str = ""
    left: frozenset[str] = field(default=frozenset())


STEPS = (
    Step(
        "Subject embedding",
        "*Train*, *Refine* and *Apply Subject Embedding* (HiPer, HiFi Tuner)",
        ("hiper", "step-wise"),
        "test_families.py::test_an_embedding_is_trained_from_an_image_with_mask_and_previews",
    ),
    Step(
        "Fine-tune",
        "*Fine-Tune On Image* (SINE) as a LoRA or with all weights",
        ("sine", "sine-full"),
        "test_families.py::test_a_fine_tune_with_mask_and_prior_images_is_trained",
    ),
    Step(
        "Optimize LoRA",
        "*Optimize LoRA* (SISO)",
        ("siso",),
        "test_families.py::test_the_image_of_an_optimized_lora_is_the_stock_samplers",
    ),
    Step(
        "Guidance",
        "*Subject Guidance* (SINE) and *Personalization Guidance*, also with a LoRA of any trainer",
        ("test_guidance.py::test_one_model_is_the_chain_with_one_model",),
        "test_family_steps.py::test_guidance_is_the_papers_equation",
    ),
    Step(
        "Inversion",
        "*Invert Image*, *Null-Text*",
        ("null-text",),
        "test_family_steps.py::test_an_inverted_image_comes_back",
    ),
    Step(
        "Reference Guide",
        "*Reference Guide* (HiFi Tuner)",
        ("reference",),
        "test_family_steps.py::test_a_reference_guided_image_is_made_again_by_the_stock_sampler",
    ),
    Step(
        "ReNoise",
        "*Invert For Few Steps* (ReNoise), of flow models for euler",
        ("test_renoise.py::test_a_stock_sampler_comes_back_to_the_picture",),
        "test_flow_inversion.py::test_few_steps_are_inverted_for_euler_and_the_report_is_true",
    ),
    Step(
        "Replace, Inspect",
        "*Replace Subject* (prompt-to-prompt), *Inspect Attention*",
        (
            "test_replace.py::test_it_is_prompt_to_prompt_written_out",
            "test_inspect.py::test_every_row_and_level_has_its_map",
        ),
        "test_joint_attention.py::test_it_is_prompt_to_prompt_written_out_and_the_source_stays",
        refused="The attention to the prompt is not shown to ComfyUI's hook, or the tokens are mixed before it",
        says="do not show what of the image looks at which token",
        left=frozenset({"PixArt", "HunyuanDiT", "Anima", "Sana"}),
    ),
    Step(
        "Patches",
        "*Fine-Tune On Image* with patches, *Position Map* (SINE)",
        ("test_position_map.py::test_the_map_changes_the_picture_and_nothing_stays_behind",),
        "test_placed_crops.py::test_a_model_is_told_where_it_is_if_its_positions_move",
        refused="There is no first convolution for a map and no rotary positions that ComfyUI moves; *Fine-Tune On "
        "Image* trains on the whole image",
        says="cannot be told where in an image it is",
        left=frozenset(tiny_families.listed()) - {"FLUX.1", "FLUX.2", "Z-Image", "Lumina2", "Wan"},
    ),
    Step(
        "EZIGen",
        "the nodes of EZIGen, with an adapter that was trained for the model; the published one is SD2.1-base's",
        ("adapter|test_adapter_gradients.py::test_gradients_of_every_tensor",),
        refused="Adapters stand in a UNet's blocks, and are trained for models without a pooled prompt vector",
        says="the adapter stands in the transformer blocks of the UNet",
        left=frozenset({"SDXL"}),
    ),
)


def function(test: str) -> ast.FunctionDef:
    """The definition of file::name; ValueError if there is none."""
    file, _, name = test.partition("::")
    for node in ast.walk(ast.parse((CONTRACT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"The table of models names {test}, which is not there; name the test that shows it.")


def of_unets(evidence: tuple[str, ...]) -> set[str]:
    """The UNets with which these tests run."""
    found = set(UNETS)
    for tests in evidence:
        found &= {name for test in tests.split("|") for name in _unets_of(test)}
    return found


def _unets_of(test: str) -> set[str]:
    from .contract.methods import METHODS

    methods = {entry.name: set(entry.families) for entry in METHODS}
    if test in methods:
        return methods[test]
    code = ast.unparse(function(test))
    if "tiny_models.FAMILIES" in code:
        return set(UNETS)
    return {"sd2_v"} if "sd2_base" in code else {"sd1"}  # that of a Setting()


def cells(step: Step) -> Mapping[str, str]:
    """What is said of each model."""
    tested = of_unets(step.unets)
    found = {
        label: "no" if label in step.left else TESTED if name in tested else UNTESTED for name, label in UNETS.items()
    }
    if step.each and not any(ast.unparse(mark) == "each_family" for mark in function(step.each).decorator_list):
        raise ValueError(f"{step.each} does not run with each_family, but the table of models says so.")
    for family in tiny_families.listed():
        shown = step.each and family not in step.left
        found[family] = TESTED if shown else "no" if step.refused else UNTESTED
    return found


def table() -> Iterator[str]:
    """A row for each model, a column for each step, and why not below."""
    columns = {step.name: cells(step) for step in STEPS}
    notes = {step.name: number for number, step in enumerate((step for step in STEPS if step.refused), 1)}
    yield "| model | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for model in columns[STEPS[0].name]:
        row = [said[model] if said[model] != "no" else f"no ({notes[name]})" for name, said in columns.items()]
        yield f"| {model} | " + " | ".join(row) + " |"
    yield ""
    yield from (f"- {step.name}: {step.nodes}." for step in STEPS)
    yield ""
    yield from (f"{notes[step.name]}. {step.refused}." for step in STEPS if step.refused)


def short() -> Iterator[str]:
    """A row for each step, a column for each kind of model."""
    families = len(tiny_families.listed())
    yield f"| step | SD1.x, SD2.x, SDXL | {families} families of transformers (FLUX, Z-Image, Qwen-Image and others) |"
    yield "|---|---|---|"
    for step in STEPS:
        said = cells(step)
        unets, others = (_those(said, names) for names in (UNETS.values(), tiny_families.listed()))
        yield f"| {step.name} | {unets} | {others} |"


def _those(said: Mapping[str, str], models: Iterable[str]) -> str:
    """Which of these models are tested."""
    able = [model for model in models if said[model] == TESTED]
    left = [model for model in models if said[model] != TESTED]
    some = f"only {', '.join(able)}" if len(able) < len(left) else f"all but {', '.join(left)}"
    return "yes" if not left else some if able else "no"


def written(text: str, page: str) -> str:
    """A page's text with its table made anew."""
    begin, end = MARK.format(PAGES[page]), MARK.format("end")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page} has no place for the table: put {begin} and {end} around it.")
    return "\n".join([before + begin, "", *(table() if page.startswith("docs") else short()), "", end + after])


def main(_arguments: list[str]) -> int:
    """Write the tables."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text(encoding="utf-8"), page), encoding="utf-8")
    return 0

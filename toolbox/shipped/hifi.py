"""The shipped graphs of HiFi Tuner: a masked, step-wise embedding, a reference picture, a replaced subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..drawing import Drawing, Node, Output
from .inversion import ADVICE, BLEND, DIRECT, FRESH_LEVELS, LEVELS, SOURCE, UNTIL, WORD, Inverted, Levels
from .pieces import CFG, HUB, MODEL_NOTE, OFF_NOTE, SEED, VISION_NOTE, score_node

ROOM = 16  # pixels around the subject that goes
CAPTION, TARGET = "a photo of a dog", "a photo of a dog on the beach"
SUBJECT, ANCHOR_WEIGHT = "dog", 0.01
SAVED = "likeness/hifi_00001_.safetensors"
DETECTOR, SAM, REFERENCE, BLIP = (
    "grounding-dino-tiny",
    "sam_vit_b_01ec64.pth",
    "dino-vits16",
    "blip-image-captioning-base",
)
MASK_ROWS = f"""| [{DETECTOR}]({HUB}/IDEA-Research/{DETECTOR}) (all .json and .txt files, model.safetensors) \
| models/likeness_vision/{DETECTOR} | Apache-2.0 |
| [{SAM}](https://dl.fbaipublicfiles.com/segment_anything/{SAM}) | models/sams | Apache-2.0 |
"""
MASK_NOTE = """
The masks also need a package: `pip install segment-anything` with ComfyUI's Python. A MASK of your own in the place \
of a 'Mask' node does as well, and needs neither.
"""
REFERENCE_ROWS = f"""| [{REFERENCE}]({HUB}/facebook/{REFERENCE}) (config.json, preprocessor_config.json, \
model.safetensors) | models/likeness_vision/{REFERENCE} | Apache-2.0 |
"""
BLIP_NOTE = f"""| [{BLIP}]({HUB}/Salesforce/{BLIP}) (all .json and .txt files, model.safetensors) \
| models/likeness_vision/{BLIP} | BSD-3-Clause |

The groups "Caption" and "Mask" are switched off, so that their models need not be there. To switch one on, \
right-click its title and choose "Set Group Nodes to Always". "Caption" writes a description of the picture, to be \
copied into 'Prompt of the picture to change'. \
"Mask" finds the subject that goes, by the word in 'What goes'; only there, grown by 'Room for the new one', the \
picture changes then. A MASK that you paint does as well: lead it into 'Room for the new one'.
"""
FIRST = (
    "**First** load your own picture (example.png only holds its place; it is cut to a 512 x 512 square), write in "
    "'Mask' what the subject is, in one word, and use the same word in the prompts. "
)


class Subject(Inverted):
    """Learning a subject, and its reference picture."""

    def mask(self, title: str, image: Output) -> Node:
        return self.draw.node("LikenessSubjectMask", title, image=image, subject=SUBJECT, detector=DETECTOR, sam=SAM)

    def train(self, title: str, model: Node, picture: Output, positive: Output, empty: Output, **more: Any) -> Node:
        """One embedding for all steps, from the empty prompt's rows."""
        return self.draw.node(
            "LikenessTrainEmbedding",
            title,
            extra=420,
            model=model["MODEL"],
            positive=positive,
            image=picture,
            vae=model["VAE"],
            negative=empty,
            init="empty prompt",
            seed=SEED,
            preview_steps=0,
            **more,
        )

    def refine(
        self, model: Node, picture: Output, mask: Output, positive: Output, empty: Output, trained: Node, levels: Levels
    ) -> Node:
        return self.draw.node(
            "LikenessRefineEmbedding",
            "Refine for each step",
            extra=140,
            model=model["MODEL"],
            positive=positive,
            embedding=trained["embedding"],
            sigmas=levels.sigmas,
            image=picture,
            vae=model["VAE"],
            mask=mask,
            negative=empty,
            anchor_weight=ANCHOR_WEIGHT,
            seed=SEED,
        )

    def apply(self, title: str, prompt: Output, embedding: Output, model: Node) -> Output:
        node = self.draw.node(
            "LikenessApplyEmbedding", title, conditioning=prompt, embedding=embedding, model=model["MODEL"], scale=1.0
        )
        return node["conditioning"]

    def fresh(
        self, title: str, model: Node, positive: Output, empty: Output, begin: Beginning, levels: Levels
    ) -> Output:
        """A picture from noise."""
        latent = self.exact(title, model["MODEL"], positive, empty, begin.canvas, levels, begin.noise)
        return self.decode(latent, model)


@dataclass(frozen=True)
class Beginning:
    """Where new pictures come from."""

    canvas: Output
    noise: Output


@dataclass(frozen=True)
class Reference:
    """The reference, chosen and laid on the picture that it shall guide."""

    chosen: Node
    aligned: Node


def reference_for(make: Subject, pictures: Output, masks: Output, unguided: Output, vision: Output) -> Reference:
    """Choose and align, with the mask of the unguided picture."""
    where = make.mask("Mask of the unguided picture", unguided)
    chosen = make.draw.node(
        "LikenessChooseReference", "Reference", images=pictures, picture=unguided, vision=vision, masks=masks
    )
    aligned = make.draw.node(
        "LikenessAlign", "Laid on it", image=chosen["image"], mask=chosen["mask"], target_mask=where["mask"]
    )
    return Reference(chosen, aligned)


def guide(
    make: Subject,
    model: Node,
    positive: Output,
    empty: Output,
    caption: Output,
    reference: Reference,
    begin: Beginning,
    levels: Levels,
) -> Node:
    """Invert the aligned reference and let it guide."""
    aligned = reference.aligned
    inverted = make.invert("Invert the reference", model["MODEL"], aligned["image"], caption, model["VAE"], levels)
    return make.draw.node(
        "LikenessReferenceGuide",
        "Guide by the reference",
        extra=140,
        model=model["MODEL"],
        positive=positive,
        negative=empty,
        noise=begin.noise,
        trajectory=inverted["trajectory"],
        mask=aligned["mask"],
        cfg=CFG,
    )


def train_subject(draw: Drawing) -> None:
    """Mask, training, refinement, and new pictures."""
    make = Subject(draw)
    draw.note(
        "# Learn a subject for each step (HiFi Tuner)\nLearns the subject of a picture as five rows of the prompt: "
        "only inside its mask, held near the empty prompt's rows, and then refined for each of the 50 denoising steps. "
        "Three pictures from the same noise: the prompt alone, with one embedding for all steps, with the step-wise "
        "one. 'Maps' shows where the learned rows look, from noise (left) to picture (right).\n\n"
        + FIRST
        + "Several pictures (3 to 5): add a Load Image and an Image Scale like these two for each, join them with "
        "Batch Images, and put that batch in the place of the scaled picture, in all its links but the one to "
        "'reference' of 'Score'. The result is saved as models/likeness_embeddings/likeness/hifi_00001_.safetensors, "
        "for 'hifi_reference_guided' and 'hifi_replace_subject'; every further training counts up.\n\n"
        "1000 and 500 steps; each training runs once: queueing again only samples, and Cancel loses nothing.\n\n"
        + FRESH_LEVELS
        + MODEL_NOTE
        + MASK_ROWS
        + VISION_NOTE
        + OFF_NOTE
        + MASK_NOTE,
        1060,
    )
    model = make.model()
    draw.column()
    picture = make.subject()
    mask = make.mask("Mask", picture)
    draw.node("PreviewImage", "What was found", images=mask["picture"])
    target_text = make.text("Prompt of the new picture", TARGET)
    draw.column()
    caption = make.prompt("Source prompt", model["CLIP"], CAPTION)
    target = make.prompt("Prompt, encoded", model["CLIP"], target_text)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    levels = make.levels(model, noiseless=False)
    begin = Beginning(make.canvas(), make.noise())
    draw.column()
    trained = make.train(
        "Learn the subject", model, picture, caption, empty, mask=mask["mask"], anchor_weight=ANCHOR_WEIGHT
    )
    draw.column()
    refined = make.refine(model, picture, mask["mask"], caption, empty, trained, levels)
    draw.node("LossGraphNode", "Loss curve", extra=260, loss=refined["loss"], filename_prefix="likeness/loss")
    draw.node(
        "LikenessSaveEmbedding", "Save the subject", embedding=refined["embedding"], filename_prefix="likeness/hifi"
    )
    draw.column()
    one = make.apply("Subject, one for all steps", target, trained["embedding"], model)
    each = make.apply("Subject, step-wise", target, refined["embedding"], model)
    encoded = draw.node("VAEEncode", "Encoded", pixels=picture, vae=model["VAE"])["LATENT"]
    again = make.apply("Subject in the source prompt", caption, refined["embedding"], model)
    maps = draw.node(
        "LikenessInspect", "Where the rows look", model=model["MODEL"], conditioning=again, latent=encoded, seed=SEED
    )
    make.save("Maps", maps["maps"], "hifi_maps")
    draw.column()
    images = [
        make.fresh(title, model, positive, empty, begin, levels)
        for title, positive in (("Sample alone", target), ("Sample one", one), ("Sample step-wise", each))
    ]
    draw.column()
    titles = ("Prompt alone", "One embedding", "Step-wise embedding")
    for title, image, name in zip(titles, images, ("alone", "one", "step_wise"), strict=True):
        make.save(title, image, f"hifi_{name}")
    draw.column()
    scores(make, images, picture, target_text, bypassed=True)


def scores(make: Subject, images: list[Output], picture: Output, text: Output, bypassed: bool) -> None:
    """Identity and prompt of all pictures, in a group of its own."""
    draw = make.draw
    dino, clip = make.vision()
    batches: list[Node] = []
    batch = images[0]
    for image in images[1:]:
        batches.append(draw.node("ImageBatch", image1=batch, image2=image))
        batch = batches[-1]["IMAGE"]
    score = score_node(draw, batch, picture, text, dino, clip)
    shown = make.save("Scores", score["picture"], "hifi_scores")
    draw.group("Scores", [dino, clip, *batches, score, shown], bypassed=bypassed)


def reference_guided(draw: Drawing) -> None:
    """A saved subject in a new picture, with the details of the nearest reference."""
    make = Subject(draw)
    draw.note(
        "# A picture with a reference's details (HiFi Tuner)\nSamples the saved subject in a new prompt, chooses which "
        "of the subject's pictures is most like the result, lays it on the result's subject, inverts it, and samples "
        "again with the same noise: inside the mask the negative prompt of steps 11 to 41 is optimised until the "
        "steps meet the reference.\n\nRun 'hifi_train_subject' once first and choose its file in 'Saved subject' "
        "(press R if the list does not show it). **Then** load two pictures of the subject (more by further Batch "
        "Images nodes), write in both 'Mask' nodes what the subject is, and describe the references plainly in 'Prompt "
        "of the reference'. Made for things that keep their shape (a mug, a shoe, a toy); with an animal only when the "
        "reference shows nearly the same pose: where 'Laid over' has little green ('How well it covers' is below 0.7), "
        "take another picture or another number in 'Noise'.\n\nNearer "
        "to the reference: raise inner_steps or end_percent in 'Guide by the reference'. 'Laid over' shows in green "
        "where both subjects are.\n\nThe group 'Play back' samples the same picture with stock nodes, from what was "
        "found; it is switched off.\n\n" + FRESH_LEVELS + MODEL_NOTE + REFERENCE_ROWS + MASK_ROWS + MASK_NOTE,
        1020,
    )
    model = make.model()
    loaded = draw.node("LikenessLoadEmbedding", "Saved subject", name=SAVED)
    vision = draw.node("LikenessLoadVision", "DINO (reference)", name=REFERENCE)
    draw.column()
    first, second = make.subject("Picture 1 of the subject"), make.subject("Picture 2 of the subject")
    pictures = draw.node("ImageBatch", "Pictures of the subject", image1=first, image2=second)["IMAGE"]
    masks = make.mask("Mask", pictures)
    draw.column()
    caption = make.prompt("Prompt of the reference", model["CLIP"], CAPTION)
    target = make.prompt("Prompt of the new picture", model["CLIP"], TARGET)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    levels = make.levels(model, noiseless=False)
    begin = Beginning(make.canvas(), make.noise())
    draw.column()
    positive = make.apply("Subject in the prompt", target, loaded["embedding"], model)
    unguided = make.fresh("Sample unguided", model, positive, empty, begin, levels)
    draw.column()
    reference = reference_for(make, pictures, masks["mask"], unguided, vision["vision"])
    draw.node("PreviewImage", "Laid over", images=reference.aligned["overlay"])
    draw.node("PreviewAny", "Which and how", extra=160, source=reference.chosen["info"])
    draw.node("PreviewAny", "How well it covers", source=reference.aligned["iou"])
    draw.column()
    guided = guide(make, model, positive, empty, caption, reference, begin, levels)
    draw.node("PreviewAny", "Report", extra=160, source=guided["report"])
    draw.column()
    make.save("Unguided", unguided, "hifi_unguided")
    make.save("Guided by the reference", make.decode(guided["latent"], model), "hifi_guided")
    draw.column()
    again = draw.node("CFGGuider", model=guided["model"], positive=positive, negative=guided["negative"], cfg=CFG)
    sampled = draw.node(
        "SamplerCustomAdvanced",
        "Played back",
        extra=260,
        noise=begin.noise,
        guider=again["GUIDER"],
        sampler=levels.sampler,
        sigmas=levels.sigmas,
        latent_image=begin.canvas,
    )
    decoded = draw.node("VAEDecode", samples=sampled["output"], vae=model["VAE"])
    saved = make.save("The same again", decoded["IMAGE"], "hifi_played_back")
    draw.group("Play back", [again, sampled, decoded, saved], bypassed=True)


def replace_subject(draw: Drawing) -> None:
    """A saved subject takes the place of another one in a picture."""
    make = Subject(draw)
    draw.note(
        "# Put a learned subject into a picture (HiFi Tuner)\nInverts a picture, exchanges the word for what it shows "
        "by the word for your subject, and adds the saved subject's rows. Everything but the new word and these rows "
        "looks where it looked in the picture. Beside it the same without the saved subject.\n\nRun "
        "'hifi_train_subject' once first and choose its file in 'Saved subject' (press R if the list does not show "
        "it). **Then** load the picture to change, describe it plainly in 'Prompt of the picture to change', and write "
        "in 'Replace by the subject' and 'Replace by the word' which word goes and what your subject is.\n\n"
        + ADVICE
        + LEVELS
        + MODEL_NOTE
        + MASK_ROWS
        + BLIP_NOTE
        + MASK_NOTE,
        1010,
    )
    model = make.model()
    loaded = draw.node("LikenessLoadEmbedding", "Saved subject", name=SAVED)
    draw.column()
    picture = make.subject("Picture to change")
    text = make.text("Prompt of the picture to change", SOURCE)
    captioned = draw.node("LikenessCaption", "Describe it", image=picture, model=BLIP)
    shown = draw.node("PreviewAny", "Its description", extra=160, source=captioned["caption"])
    draw.group("Caption", [captioned, shown], bypassed=True)
    draw.column()
    goes = draw.node("LikenessSubjectMask", "What goes", image=picture, subject=WORD, detector=DETECTOR, sam=SAM)
    room = draw.node("GrowMask", "Room for the new one", mask=goes["mask"], expand=ROOM)
    draw.group("Mask", [goes, room], bypassed=True)
    draw.column()
    positive = make.prompt("Prompt to change, encoded", model["CLIP"], text)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    levels = make.levels(model)
    draw.column()
    inverted = make.invert("Invert", model["MODEL"], picture, positive, model["VAE"], levels)
    way = make.back("Way back", model, positive, empty, inverted, DIRECT)
    draw.column()
    swaps = []
    rows: dict[str, dict[str, Any]] = {
        "Replace by the word": {},
        "Replace by the subject": {"embedding": loaded["embedding"]},
    }
    for title, more in rows.items():
        swaps.append(
            draw.node(
                "LikenessReplaceSubject",
                title,
                model=way["model"],
                clip=model["CLIP"],
                latent=inverted["latent"],
                negative=way["negative"],
                prompt=text,
                word=WORD,
                replacement=SUBJECT,
                end_percent=UNTIL,
                blend=BLEND,
                mask=room["MASK"],
                **more,
            )
        )
    draw.column()
    results = [
        make.decode(make.exact(title, swap["model"], swap["positive"], swap["negative"], swap["latent"], levels), model)
        for title, swap in zip(("Word alone", "Word and subject"), swaps, strict=True)
    ]
    draw.column()
    make.save("Picture and word swap", results[0], "hifi_swap")
    make.save("Picture and replaced subject", results[1], "hifi_replaced")


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "hifi_train_subject": train_subject,
    "hifi_reference_guided": reference_guided,
    "hifi_replace_subject": replace_subject,
}

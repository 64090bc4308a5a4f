"""Look at the UNet in training: sample the evaluation prompts from unet.pt, judge them, write a contact sheet."""

from __future__ import annotations

import argparse

import torch

from . import comfyui, evaluation, painting, world
from .latents import load_autoencoder
from .networks import TextEncoder, make_unet, sample, token_ids
from .training import WORK, log


def main(arguments: list[str]) -> None:
    """`run.py peek [--prompts N] [--full]`; --full mentions every attribute in the prompts."""
    from transformers import CLIPTokenizer

    parser = argparse.ArgumentParser(prog="run.py peek")
    parser.add_argument("--prompts", type=int, default=evaluation.PROMPTS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    comfyui.prepare()
    saved = torch.load(WORK / "unet.pt", weights_only=True)
    unet, text = make_unet(), TextEncoder(saved["vocabulary"])
    unet.load_state_dict(saved["unet"])
    text.load_state_dict(saved["text"])
    _, decoder = load_autoencoder()
    identities, places, truth = evaluation.held_out_prompts(options.prompts)
    words = world.ALL_WORDS if options.full else world.MAIN_WORDS
    prompts = [world.caption(idn, place, words) for idn, place in zip(identities, places, strict=True)]
    tokenizer = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))
    with torch.no_grad():
        context = text(text.rows_of(token_ids(tokenizer, [*prompts, ""])))
        latents = sample(unet, context[:-1], context[-1:], options.seed, guidance=options.guidance)
        pictures = decoder(latents * saved["scale"] + saved["shift"]).clamp(0, 1)
    painting.contact_sheet(evaluation.to_uint8(pictures), 12).save(WORK / "samples.png")
    log("UNet after", saved["steps"], "steps")
    if (WORK / "judge.pt").exists():
        from .judge import Judge

        judge = Judge()
        judge.load_state_dict(torch.load(WORK / "judge.pt", weights_only=True))
        judge.train(False)
        log(evaluation.accuracy(judge, pictures, truth), evaluation.texture_table(judge, pictures, truth))

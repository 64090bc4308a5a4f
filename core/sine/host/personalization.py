"""Personalization guidance (Park et al., ICCV 2025, arXiv 2508.00319): a partly unlearned model takes the null prompt.

    eps~ = eps_weak(null) + w (eps_tuned(c) - eps_weak(null)),   theta_weak = (1 - omega) theta_base + omega theta_tuned

Classifier-free guidance (omega = 1) moves towards the prompt only, and so away from what the fine-tuning learned. A
weak model knows less of the subject than the fine-tuned one, so that the difference points to both. A step takes two
evaluations, as in plain sampling. The outer formula is the sampler's own CFG; its negative prediction is exchanged.

Deviation: the weak weights are computed where they are used. A plain LoRA of the fine-tuned model runs at omega times
its strength during the negative prediction, without a copy of any weight.
"""

from typing import Any

from .guidance import SubjectModel, attached

OMEGA = 0.75  # in toyworld it raises identity and leaves text score and place as they are


def with_personalization(base: Any, tuned: Any, omega: float) -> Any:
    """A clone of the fine-tuned MODEL whose negative prediction is the weak model's.

    omega: what the weak model keeps of the fine-tuning, in 0..1. ValueError, before anything runs, for models that
    cannot be mixed or separated, and for omega > 0 when the models are two loaded files.
    """
    if omega and not tuned.is_clone(base):
        raise ValueError(
            f"'weak' is {omega:g}, but the two models are two loaded files, whose weights cannot be interpolated while "
            "they sample: set it to 0, or load the fine-tuning onto the base model as a LoRA."
        )
    return attached(tuned, [SubjectModel(base, None, 1.0, share=1.0 - omega)], "negative")

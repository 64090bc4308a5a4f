"""Training EZIGen's adapter on large sets of images, by Hugging Face Accelerate on a diffusers folder of SD2.1-base.

Started by toolbox/train_adapter.py; docs/train_adapter.md tells how. Nothing of it is imported by ComfyUI.
"""

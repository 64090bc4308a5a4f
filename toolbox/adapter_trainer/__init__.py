"""Train EZIGen's adapter on large image datasets, with Hugging Face Accelerate and a diffusers folder of SD2.1-base.

Started by toolbox/train_adapter.py; see docs/train_adapter.md. ComfyUI imports none of it.
"""

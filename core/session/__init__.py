"""Shared: the layer between a method and ComfyUI: models, memory, gradients, progress, folders, run keys."""

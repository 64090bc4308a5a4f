"""Shared: LoRA adapters for the layers of any model, and their file format."""

"""SINE: fine-tuning on patches of one image, and guidance that edits it."""

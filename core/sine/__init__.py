"""SINE: fine-tuning on patches of one image, and the guidance that edits it."""

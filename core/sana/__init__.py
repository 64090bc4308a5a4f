"""Sana through diffusers, as MODEL, CLIP and VAE."""

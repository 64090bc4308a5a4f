"""Inverting an image: DDIM, null-text, ReNoise and latent rectification."""

"""Image inversion: DDIM, null-text, ReNoise and latent rectification."""

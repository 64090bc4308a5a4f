"""HiFi Tuner, Algorithm 2: sampling guided by an aligned reference image."""

"""Shared: optimization runs that can be interrupted, resumed from disk, and reused without training. Torch only."""

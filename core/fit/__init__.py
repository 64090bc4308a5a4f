"""Shared: one optimization at a time, its state on disk, stopped, resumed and served again. Torch only."""

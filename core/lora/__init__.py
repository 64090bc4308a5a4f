"""Shared: low-rank weights beside the layers of any model, and the file that keeps them."""

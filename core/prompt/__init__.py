"""Shared: what is done to a CONDITIONING's token embeddings, whoever learned them. Torch only outside of host."""

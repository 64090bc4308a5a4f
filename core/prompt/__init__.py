"""Shared: operations on the token embeddings of a CONDITIONING, independent of the method. Torch only outside host."""

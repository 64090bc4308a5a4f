"""SISO: optimize a LoRA for the similarity of its generated images to a subject."""

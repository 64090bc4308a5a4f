"""SISO: optimizing a LoRA against the similarity of the images that it makes."""

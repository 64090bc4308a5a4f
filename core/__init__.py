"""The algorithms. Torch only: nothing here knows ComfyUI, except the sub-package host."""

"""The ComfyUI side of this room."""

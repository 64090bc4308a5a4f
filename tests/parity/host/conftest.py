"""These tests need ComfyUI's modules in the process."""

from ... import inprocess

inprocess.start()

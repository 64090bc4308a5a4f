"""Command-line tools outside ComfyUI: setup, a driven server, the demonstration, the tests."""

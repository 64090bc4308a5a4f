"""Command-line tools outside of ComfyUI: set-up, a driven server, the demonstration, the tests."""

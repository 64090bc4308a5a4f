"""The small world: scenes, models trained on them, and the tools that build and measure those models."""

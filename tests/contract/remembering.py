"""Encoders for tests that give them the same images and texts again and again."""

from __future__ import annotations

from typing import Any

import torch


class Remembering:
    """A VAE or CLIP that encodes nothing twice: its weights must stay as they are."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.known = encoder, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        key = images.shape, images.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.encoder.encode(images)
        return self.known[key]

    def encode_from_tokens(self, tokens: dict[str, Any]) -> torch.Tensor:
        key = repr(tokens)
        if key not in self.known:
            self.known[key] = self.encoder.encode_from_tokens(tokens)
        return self.known[key]

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any], **more: Any) -> list:
        key = repr((tokens, more))
        if key not in self.known:
            self.known[key] = self.encoder.encode_from_tokens_scheduled(tokens, **more)
        return [[rows, {**options}] for rows, options in self.known[key]]

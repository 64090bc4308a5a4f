"""Shared: vision models, similarity scores, subject masks and sheets of images."""

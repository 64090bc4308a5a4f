"""Prompt-to-prompt: replace a word through its cross-attention maps."""

"""Prompt-to-prompt: replacing a word through its cross-attention maps."""

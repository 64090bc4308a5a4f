"""Wrappers for other libraries' models. The libraries are imported inside functions, so the pack loads without them."""

"""Wrappers for other libraries' models. The libraries are imported inside functions, so the pack loads without them.

Every load_*() raises ValueError, with the remedy, for what is another model, incomplete or pickled, and RuntimeError
when the library is not installed.
"""

"""Models of other libraries, wrapped. They are imported inside functions: the pack loads without them."""

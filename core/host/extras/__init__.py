"""Models of other libraries, wrapped. They are imported inside functions, so that the pack loads without them."""

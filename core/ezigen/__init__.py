"""EZIGen: features of a subject's image, its adapter, and sampling in stages."""

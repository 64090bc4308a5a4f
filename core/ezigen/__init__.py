"""EZIGen: subject features from the UNet, the adapter that reads them, and sampling in stages."""

"""The data stream: which samples a step has, and the loader that reads them."""

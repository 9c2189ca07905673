"""Data stream: the plan of samples for each step, and the loader that reads them."""

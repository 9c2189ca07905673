"""Weight-space ensembles: weighted means of the weights of several artifacts."""

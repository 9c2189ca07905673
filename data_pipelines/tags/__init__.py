"""Tags of samples: reader, vocabulary, labels, balanced sampling and concept matching."""

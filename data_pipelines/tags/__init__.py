"""Tags of samples: their reader, vocabulary, balance and matching."""

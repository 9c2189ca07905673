"""From bytes to pixels: decoders, their sandbox, transforms and augmentation."""

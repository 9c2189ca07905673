"""Decoding: image and video decoders, the decode process, transforms and augmentation."""

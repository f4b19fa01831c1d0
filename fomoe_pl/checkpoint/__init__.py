"""Checkpoints: the format, writing while training goes on, and going on from them on the same sites or others."""

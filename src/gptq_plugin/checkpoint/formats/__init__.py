"""Checkpoint formats, a file each: a layer's tensors on disk, and the description that tells how to read them.

A new format is one new file here, its name in `config.CHECKPOINT_FORMATS` and its instance in `registry`.
"""

"""What quantizations keep for others: files named by a hash of everything they follow from, and that hash.

Imports device and errors; never torch.distributed, and nothing here knows what is kept.
"""

"""`gptq-plugin check`: finds faults of a checkpoint, by itself and beside its float model.

Imports clients, checkpoint and what is below them; never export or quantize.
"""

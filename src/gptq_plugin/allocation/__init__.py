"""Bits at a budget: which grid each layer gets, so that the model stays nearest to the float one at a given size.

Imports clients and what is below them; never quantize, export, training or a trainer.
"""

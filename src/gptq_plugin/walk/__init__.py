"""Lock-step: all batches walk the model together, and what is measured on the way. Knows no quantization.

Imports distributed and device; never layers or model.
"""

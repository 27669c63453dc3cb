"""Lock-step: all batches walk the model together, and their layers' inputs are measured. Knows no quantization.

Imports distributed and device; never layers or model.
"""

"""Lock-step: all batches walk the model together, and their layers' inputs are measured. Knows no quantization.

Imports distributed, device and kernels; never layers or model.
"""

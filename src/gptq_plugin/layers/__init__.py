"""QuantLinear and its packed words.

Imports device, gptq and kernels; never walk or model.
"""

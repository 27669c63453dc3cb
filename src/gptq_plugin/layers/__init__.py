"""QuantLinear and its packed words.

Imports gptq and kernels; never walk or model.
"""

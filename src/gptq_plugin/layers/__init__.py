"""QuantLinear and its packed words.

Imports gptq, kernels and errors; never walk or model.
"""

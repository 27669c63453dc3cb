"""QuantLinear, and the packed words it computes with.

Imports gptq, kernels and errors; never walk or model.
"""

"""Trains a quantized model towards its float model: scales, codes and norms. Held-out rows decide what is kept.

Imports calibration, report, memory and what is below them; never export, check or quantize.
"""

"""Trains a quantized model towards its float model: codes stay, and held-out rows decide what is kept.

Imports calibration, report, memory and what is below them; never export, check or quantize.
"""

"""The record of a quantization: as data, as a table, as a page and as a model card.

Imports model, walk, device, options, config and errors; never calibration, memory or checkpoint.
"""

"""Checkpoints on disk: their formats, their descriptions, and reading them into a model.

Imports model, layers, gptq, device, kernels, config, options and errors; never calibration, report or memory.
"""

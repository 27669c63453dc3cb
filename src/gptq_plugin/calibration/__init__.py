"""Calibration data: turns texts, tokens or dataloaders into batches, and finds the positions that count.

Imports model, walk, device, distributed, config, options and errors; never report, memory or checkpoint.
"""

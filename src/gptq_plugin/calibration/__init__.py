"""Calibration data: from texts, tokens or dataloaders to batches, and which positions of them count.

Imports model, distributed, config and errors; never report, memory or checkpoint.
"""

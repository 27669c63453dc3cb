"""Where weights, activations and finished layers lie while batches walk the model.

Imports model, layers, device and errors; never calibration, report or checkpoint.
"""

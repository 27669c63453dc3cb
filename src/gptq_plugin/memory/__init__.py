"""Where weights, activations and finished layers are kept while batches walk the model.

Imports model, layers, walk, gptq, device and errors; never calibration, report or checkpoint.
"""

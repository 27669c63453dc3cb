"""The float model: which of its layers are quantized, under which names, and what transformers and PEFT make of them.

Imports layers, walk, kernels, device, config, options and errors; never a trainer.
"""

"""The rules of vLLM, transformers, sglang and GPTQModel, a module each, and the inventory they are asked about.

Imports checkpoint, report, model, layers, device, config, options and errors; never export.
"""

"""What vLLM, transformers, sglang and GPTQModel accept, and what they would find in a checkpoint.

Imports checkpoint, report, model, layers, device, config and errors; never export.
"""

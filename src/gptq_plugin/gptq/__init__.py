"""GPTQ's mathematics on tensors: from a weight and its Hessian to codes, scales and zeros.

Imports config, device and kernels; never torch.distributed, transformers or a trainer.
"""

"""The mathematics: a weight and its Hessian in, codes and scales out. Tensors only.

Imports config, device and kernels; never torch.distributed, transformers or a trainer.
"""

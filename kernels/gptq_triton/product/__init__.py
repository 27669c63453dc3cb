"""x Wᵀ on a GPU from weights in a layout of the kernels' own, made once: `layout` defines it, `products` chooses.

Imports nothing of gptq_plugin, and of this package `needs_triton`.
"""

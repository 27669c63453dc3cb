"""The commands `gptq-finetune` and `gptq-quantize` (Hydra) and `gptq-plugin` (argparse).

Imports any folder; nothing imports it.
"""

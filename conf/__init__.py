"""The Hydra configs, installed as ``gptq_plugin.conf``; any app finds them at ``pkg://gptq_plugin.conf``."""

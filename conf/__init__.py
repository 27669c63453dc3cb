"""The Hydra configs, installed as ``gptq_plugin.conf``: ``pkg://gptq_plugin.conf`` finds them from any app."""

"""GPTQCallback, and all modules that know Lightning.

Imports training, quantize and what is below them; never hf or apps.
"""

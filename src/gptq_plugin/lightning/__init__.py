"""GPTQCallback, and everything that knows Lightning.

Imports training, quantize and what is below them; never hf or apps.
"""

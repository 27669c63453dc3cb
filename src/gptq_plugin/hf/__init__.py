"""transformers' own extension points: its Trainer's callback and its quantizer.

Imports training, quantize and what is below them; never lightning or apps.
"""

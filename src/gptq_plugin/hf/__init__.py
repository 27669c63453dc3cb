"""transformers' extension points: the Trainer's callback and the quantizer.

Imports training, quantize and what is below them; never lightning or apps.
"""

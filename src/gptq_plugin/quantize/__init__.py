"""QuantizeModule, the order of the steps, and the one pass that quantizes layer after layer.

Imports export, clients and what is below them; never training or a trainer.
"""

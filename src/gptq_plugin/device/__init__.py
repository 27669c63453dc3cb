"""Precision, defaults, streams and free memory of any device, and how often Python looks for cycles of objects.

Imports options.
"""

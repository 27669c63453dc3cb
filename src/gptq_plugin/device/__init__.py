"""Precision, defaults, streams and free memory of any device.

Imports options.
"""

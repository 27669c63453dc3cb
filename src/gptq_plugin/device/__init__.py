"""Precision, streams and free memory of any device.

Imports nothing of this package.
"""

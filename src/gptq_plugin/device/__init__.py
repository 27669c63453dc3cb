"""What any device can be asked or told: precision, streams, free memory.

Imports nothing of this package.
"""

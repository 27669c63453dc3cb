"""Writes a checkpoint: whole or not at all, read back and run before it appears. Converts between formats.

Imports clients, checkpoint, report, memory, calibration and what is below them; never check or quantize.
"""

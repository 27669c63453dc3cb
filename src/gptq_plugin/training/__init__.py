"""Shared by the callbacks of both trainers: checks before training, quality gate, escalation, the end of a run.

Imports quantize and what is below it; never a trainer.
"""

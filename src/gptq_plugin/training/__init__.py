"""Shared by the callbacks of both trainers: checks before training, quality gate, escalation, sharding, a run's end.

Imports quantize and what is below it; never a trainer.
"""

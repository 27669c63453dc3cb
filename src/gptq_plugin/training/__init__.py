"""What the callbacks of both trainers share: checks before training, quality gate, escalation, export by rank 0.

Imports quantize and what is below it; never a trainer.
"""

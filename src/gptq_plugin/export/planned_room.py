"""Room on the disk for the export of a planned quantization, asked for before the work.

Tested by tests/export/test_disk_space.py: with that of a disk that is full.
"""

from __future__ import annotations

from pathlib import Path

from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.export import export
from gptq_plugin.export.disk_space import refuse_full
from gptq_plugin.export.export_size import planned_bytes
from gptq_plugin.model.plan import Plan


def refuse_without_room(plan: Plan, directory: str | Path) -> None:
    """Refuses an export that the disk has no room for, with the layers that wait there for their file.

    Raises:
        ExportError: See `disk_space.refuse_full`.
    """
    refuse_full(Path(directory), planned_bytes(plan) + _waiting_bytes(plan))


def _waiting_bytes(plan: Plan) -> int:
    """Bytes of layers on a CPU that lie on the disk twice, at most: where they waited, and in the file that is written
    of them (`ShardWriter`)."""
    packed = sum(stored_bytes(t.shape, t.config) for t in plan.targets if t.parameter.device.type == "cpu")
    return min(packed, export.SHARD) if packed >= export.PIECE else 0

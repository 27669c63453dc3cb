"""Ports of this machine for processes that meet: those of `scripts/ports.py`."""

import runpy

from paths import REPOSITORY

reserved_port = runpy.run_path(str(REPOSITORY / "scripts" / "ports.py"))["reserved_port"]

#!/usr/bin/env bash
# Writes requirements.lock: the pinned set of constraints.txt with what it needs on any platform, each with its hashes.
# Needs uv (`pip install uv`). The versions are those of constraints.txt; uv only adds hashes, markers and what CUDA
# builds of torch bring along.
set -euo pipefail
cd "$(dirname "$0")/.."

uv pip compile pyproject.toml constraints.txt --extra dev --extra mutation --universal \
    --python-version 3.10 --generate-hashes --no-annotate --quiet --no-header --output-file requirements.lock

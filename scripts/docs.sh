#!/usr/bin/env bash
# Builds the documentation into site/; a warning is an error. Installs into .venv at the first call.
# Arguments go to mkdocs: scripts/docs.sh serve
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_setup.sh

prepare_venv "[docs]"
export NO_MKDOCS_2_WARNING=1  # an advertisement
if [ $# -eq 0 ]; then  # without --quiet, which would hide warnings from --strict too
    set -- build --strict
fi
exec "$VENV/bin/mkdocs" "$@"

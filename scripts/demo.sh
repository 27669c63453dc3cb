#!/usr/bin/env bash
# The whole job on built-in data: train a small model, quantize it with GPTQ, export, reload, compare.
# Installs into the repository's .venv at the first call. Results go to outputs/ where it is called, and arguments to
# gptq-finetune: scripts/demo.sh quantizer.bits=3
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
(
    cd "$repository"
    . scripts/_setup.sh
    prepare_venv ""
)
# So small a model gains little from more threads, and loses much where the cores are shared.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS
"$repository/.venv/bin/gptq-finetune" "$@"
echo "demo: $((SECONDS - started)) s after installation"

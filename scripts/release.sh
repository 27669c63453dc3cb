#!/usr/bin/env bash
# Builds dist/*.tar.gz and, from it, dist/*.whl, and checks both (docs/release.md). Uploads nothing.
# PYTHON names the interpreter. Takes some minutes: the wheel is installed with all it needs into an empty environment.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt build pyyaml
rm -rf dist
"$work/build/bin/python" -m build --outdir dist . > "$work/build.log" || { tail -50 "$work/build.log" >&2; exit 1; }

"$work/build/bin/python" - << 'CHECK'
import re, sys, tarfile, zipfile
from pathlib import Path
import yaml

(wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M)[1]
assert f"-{version}-" in wheel.name and sdist.name.endswith(f"-{version}.tar.gz"), (wheel.name, sdist.name, version)
cited = yaml.safe_load(Path("CITATION.cff").read_text())["version"]
assert cited == version, f"CITATION.cff has version {cited}, pyproject.toml {version}"
assert re.search(rf"^## .*\b{re.escape(version)}\b", Path("CHANGELOG.md").read_text(), re.M), f"CHANGELOG.md lacks {version}"
roots = {"src/gptq_plugin": "", "kernels/gptq_triton": "kernels/", "conf": "conf/"}
wanted = {
    f"gptq_plugin/{folder}{path.relative_to(root).as_posix()}"
    for root, folder in roots.items()
    for path in Path(root).rglob("*")
    if path.suffix in (".py", ".yaml", ".json", ".typed")
}
found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
assert found == wanted, f"wheel lacks {sorted(wanted - found)}, and has {sorted(found - wanted)}"
names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
assert {"pyproject.toml", "README.md", "LICENSE"} <= names, sorted(names)[:20]
print(f"{wheel.name}: {len(found)} files; {sdist.name}: {len(names)}")
CHECK

"$python" -m venv "$work/empty"
"$work/empty/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt torch
"$work/empty/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
"$work/empty/bin/pip" check
cd "$work"
"$work/empty/bin/python" -c "
import gptq_plugin
for name in gptq_plugin.__all__:
    if name != 'GPTQTrainerCallback':  # needs accelerate
        getattr(gptq_plugin, name)
print('imported from', gptq_plugin.__file__)"
for command in gptq-finetune gptq-quantize gptq-plugin; do
    "$work/empty/bin/$command" --help > "$work/help.txt" || { cat "$work/help.txt" >&2; exit 1; }
done
echo "checked: $(cd "$root" && ls dist | tr '\n' ' ')"

"""`gptq-plugin check`: describes a checkpoint, finds its faults, and asks which clients take it. Prints nothing.

Without the float model a checkpoint is held to its own description: sym=True means that every zero is 2^(bits-1),
desc_act=false that channel i is in group i // group_size, padding is zero, and two descriptions agree. With it, every
layer is compared with the weight it was made from (`comparison`), and every other tensor must be the float model's, or
that one cast to the checkpoint's dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptq_plugin.check.beside_float import BesideFloat
from gptq_plugin.check.by_itself import layer_findings
from gptq_plugin.check.described import facts, file_findings
from gptq_plugin.check.findings import Finding, Lint, error
from gptq_plugin.check.fit import misfits
from gptq_plugin.check.float_weights import FloatWeights
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.clients.client import CLIENTS, Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import conditions, problems
from gptq_plugin.device.surroundings import plain_defaults
from gptq_plugin.errors import some


@plain_defaults()
def lint(
    directory: str | Path,
    float_dir: str | Path | None = None,
    targets: Iterable[Client] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Lint:
    """Checks a quantized checkpoint of any tool, a layer at a time.

    Args:
        directory: The checkpoint: a folder, or the id of a repository on the hub; see `load_quantized`.
        float_dir: The float model it was made from, a folder with safetensors files or an id; None compares nothing.
        targets: The clients asked about; all of them when None.
        revision: Branch, tag or commit of the checkpoint's repository.
        token: For private or gated repositories.

    Raises:
        CheckpointError: `float_dir` cannot be read. Faults of `directory` are findings.
    """
    found = Lint()
    floats = FloatWeights(float_dir, token) if float_dir is not None else None
    try:
        checkpoint = Checkpoint.open(local_folder(directory, revision=revision, token=token))
        inventory = _find(checkpoint, floats, found)
        for target in targets if targets is not None else map(Client, CLIENTS):
            missing = target.rules.missing(inventory, checkpoint.quantization)
            found.refusals[target] = [*problems(inventory, target), *missing]
            found.conditions[target] = conditions(inventory, target)
    except ValueError as damage:  # CheckpointError, and rules that take too long
        found.add([error(str(damage))])
    return found


def _find(checkpoint: Checkpoint, floats: FloatWeights | None, found: Lint) -> Inventory:
    inventory = Inventory.of(checkpoint)
    beside = BesideFloat(checkpoint, floats) if floats is not None else None
    found.facts = facts(checkpoint, inventory)
    found.add(file_findings(checkpoint, inventory))
    if not found.errors:
        found.add(misfits(checkpoint))
    found.add(_of_layers(checkpoint, inventory, beside))
    if beside is not None:
        found.add(beside.rest())
        found.facts["compared"] = beside.summary
    return inventory


def _of_layers(checkpoint: Checkpoint, inventory: Inventory, beside: BesideFloat | None) -> Iterator[Finding]:
    """Findings of single layers; one that several layers share names them all."""
    names: dict[Finding, list[str]] = defaultdict(list)
    for entry in inventory.layers:
        layer = checkpoint.read_layer(entry.name)
        damage = list(beside.layer(entry, layer)) if beside is not None else []
        compared = beside is not None and beside.has_compared(entry)
        own = layer_findings(entry, layer, checkpoint.checkpoint_format, compared=compared)
        for finding in (*own, *damage):
            names[finding].append(entry.name)
    total = len(checkpoint.layers)
    for finding, those in names.items():
        which = f"all {total} layers" if len(those) == total > 1 else some(those)
        yield Finding(finding.level, f"{which}: {finding.message}")

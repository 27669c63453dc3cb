"""Which tensors stay on the device while a model is quantized, and which wait on the host: `place`.

Weights of the modules in use, activations of all calibration batches at one layer, and the solver share the device's
memory. If they do not fit together, weights go first: blocks of the model are copied in shortly before they are needed,
which costs little. Activations that still do not fit move to the host between the layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gptq_plugin.device.memory import free_bytes, peak_bytes
from gptq_plugin.gptq.improve import chunk_bytes, improves
from gptq_plugin.memory.slots import distinct_tensors
from gptq_plugin.model.targets import Target

UNLIMITED = 2**63 - 1  # more bytes than any device has
_GIB = 2**30
_PLANNED = 0.75  # share of the free memory; the allocator loses the rest in gaps between tensors of many sizes
_LARGEST_UNIT = _GIB  # a transformer block of most models; larger modules come in parts
# If the model is on the GPU, only the layers quantized last run with weights other than their own. On a CPU even these
# count, since the model may be mapped from files and larger than memory.
_OVERLAYS = 4 * _GIB
# The solver's tensors: bytes for every entry of the Hessian (the sum, the mean or the factor, and pieces) and of the
# weights solved together (in two layouts, the errors pushed to them for two candidates, and round-to-nearest's error).
_BYTES_HESSIAN = 12
_BYTES_WEIGHT = 30
# Where rounding is improved: the Hessian's rows for coordinate descent and its parts for the scales' equations, and the
# tensors outside of a chunk.
_BYTES_DESCENT = 12
_BYTES_OUTSIDE = 16
_BYTES_DRIFT, _BYTES_TARGET = 12, 12  # for each entry of the Hessian, the sum and the mean of a drift; of the weights
_JOINED = 1 / 3  # share of the free memory that a forward of batches put together may take
_BYTES_THREAD = 33 * 2**20  # a CUDA library's workspace on each batch's thread


@dataclass(frozen=True)
class Placement:
    """How much may be on the device.

    Attributes:
        weights: Bytes of weights that modules run with and do not own there.
        activations: Bytes that suspended batches may keep there; None is all of them.
        streamed: True if blocks of the model come and go.
        prefetch: True if a batch's activations have room to come back from the host while another batch runs.
        summary: The decision and its reason, for the log.
    """

    weights: int
    activations: int | None
    streamed: bool
    prefetch: bool
    summary: str

    @property
    def limited(self) -> bool:
        """True if anything has to wait on the host."""
        return self.streamed or self.activations is not None


@dataclass(frozen=True)
class Needs:
    """Bytes that a quantization would like to have on the device.

    Attributes:
        weights: The model's, if it has to be copied to the device.
        fixed: Quantized layers that stay on the device, and the workspaces that libraries keep there for each batch.
        solver: The solver's tensors.
        forward: The most that one batch's forward takes beside the weights.
        activations: Held by all waiting batches, at the layer where that is most.
        batch: The same for the largest batch alone.
    """

    weights: int
    fixed: int
    solver: int
    forward: int
    activations: int
    batch: int

    def joined(self, times: float) -> Needs:
        """The same where the largest batch is so many times as large."""
        return replace(self, forward=int(self.forward * times), batch=int(self.batch * times))


def room_for(free: int | None, needs: Needs, most: float, placed: Callable[[Needs], Placement]) -> float:
    """How many times its size the largest batch may have, where no more has to wait on the host for that.

    Args:
        free: Bytes free on the device; None if that is not known.
        needs: Bytes wanted there.
        most: The most times.
        placed: `place` by what is wanted.

    Returns:
        1 where activations have to wait on the host as it is.
    """
    first = placed(needs)
    if free is None or first.activations is not None:
        return 1.0
    times = min(most, free * _JOINED / max(1, needs.forward))
    while times > 1:
        then = placed(needs.joined(times))
        if (then.activations, then.streamed, then.prefetch) == (None, first.streamed, first.prefetch):
            return times
        times /= 2
    return 1.0


def place(
    device: torch.device,
    free: int | None,
    needs: Needs,
    min_resident_bytes: int,
    offload_weights: bool | None,
    offload_activations: bool | None,
) -> Placement:
    """Decides from free memory what stays on the device.

    Args:
        device: Where the batches run.
        free: Bytes free there; None if there is no limit.
        needs: Bytes wanted there.
        min_resident_bytes: Bytes of weights that must fit: the block in use and its neighbours; see `weights.Weights`.
        offload_weights: True keeps only a few blocks there, False all; None decides.
        offload_activations: True moves all suspended activations to the host, False none; None decides.
    """
    prefetch = True
    if free is None:
        weights, activations = UNLIMITED, UNLIMITED
    else:
        room = int(free * _PLANNED) - needs.fixed - max(needs.solver, needs.forward)
        prefetch = min_resident_bytes + needs.batch <= room
        if needs.weights + needs.activations <= room:
            weights, activations = UNLIMITED, UNLIMITED
        else:
            weights = max(min_resident_bytes, room - needs.activations)
            activations = max(0, room - weights)
            if activations >= needs.activations:
                activations = UNLIMITED
    if offload_weights is not None:
        weights = min_resident_bytes if offload_weights else UNLIMITED
    if offload_activations is not None:
        activations = 0 if offload_activations else UNLIMITED
    all_weights = weights >= needs.weights
    all_activations = activations >= needs.activations and offload_activations is not True
    if not needs.weights:
        weights = min_resident_bytes if device.type == "cpu" else _OVERLAYS
    parts = [
        f"weights {'stay there' if not needs.weights else 'all there' if all_weights else 'streamed block by block'}"
        + (f" ({needs.weights / _GIB:.1f} GiB)" if needs.weights else ""),
        f"activations {'all there' if all_activations else f'beyond {activations / _GIB:.1f} GiB on the CPU'}"
        f" ({needs.activations / _GIB:.1f} GiB)",
    ]
    known = "" if free is None else f", {free / _GIB:.1f} GiB free, the solver needs {needs.solver / _GIB:.1f}"
    return Placement(
        weights=UNLIMITED if all_weights and needs.weights else weights,
        activations=None if all_activations else activations,
        streamed=not all_weights,
        prefetch=prefetch,
        summary=f"memory on {device}: {'; '.join(parts)}{known}",
    )


def beyond(device: torch.device, allowed: int | None) -> list[str]:
    """A sentence if more bytes were on the device at a time than were allowed; None allows all."""
    peak = peak_bytes(device)
    if peak is None or allowed is None or peak <= allowed:
        return []
    return [
        f"{peak / 2**20:.0f} MiB on {device} at the peak, where {allowed / 2**20:.0f} were allowed: as little as "
        "possible was kept there"
    ]


def fits(model: nn.Module, device: torch.device) -> bool:
    """True if the whole model can be moved to the device with room to quantize it there."""
    free = free_bytes(device)
    return free is None or bytes_away(model, device) <= free // 2


def bytes_away(model: nn.Module, device: torch.device) -> int:
    """Bytes of parameters and buffers that are not on the device, each tensor once."""
    return sum(tensor.nbytes for tensor in distinct_tensors(model) if tensor.device != device)


def solver_bytes(targets: Sequence[Target]) -> int:
    """The most bytes that solving takes: layers of one parent with equally many inputs may be solved together."""
    together: dict[tuple[str, int], list[Target]] = defaultdict(list)
    for target in targets:
        together[target.name.rpartition(".")[0], target.shape[1]].append(target)
    return max(_solver_bytes(some, n) for (_, n), some in together.items())


def _solver_bytes(targets: Sequence[Target], n: int) -> int:
    rows, improved = sum(one.shape[0] for one in targets), [t.config for t in targets if improves(t.config)]
    is_asymmetric = any(one.config.asymmetric_alpha for one in targets)
    drift, target = _BYTES_DRIFT * is_asymmetric, _BYTES_TARGET * is_asymmetric
    if not improved:
        return n * n * (_BYTES_HESSIAN + drift) + n * rows * (_BYTES_WEIGHT + target)
    of_weights = n * rows * _BYTES_OUTSIDE + max(chunk_bytes(n * rows, config) for config in improved)
    return n * n * (_BYTES_HESSIAN + _BYTES_DESCENT + drift) + of_weights


def fixed_bytes(targets: Sequence[Target], device: torch.device, batches: int) -> int:
    """Bytes for `Needs.fixed`: codes (scales and zeros add little) and workspaces."""
    codes = sum(math.prod(t.shape) * t.config.bits // 8 for t in targets if t.parameter.device == device)
    return codes + (batches * _BYTES_THREAD if device.type == "cuda" else 0)


def unit_bytes(model: nn.Module, free: int | None) -> int:
    """Size up to which a module's weights are brought as a whole: a small part of the model and of free memory."""
    whole = sum(tensor.nbytes for tensor in distinct_tensors(model))
    return min(_LARGEST_UNIT, whole // 8, _LARGEST_UNIT if free is None else free // 8)

"""Writes a safetensors file tensor by tensor: `write_tensors`.

safetensors before 0.8 copies all tensors of a file before it writes them, which takes the file's size of memory once
more. The format (https://github.com/huggingface/safetensors#format) is a length, a header, and the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptq_plugin.device.raw_bytes import raw_bytes
from gptq_plugin.errors import ExportError

_DTYPES = {  # in the order of safetensors' own files: numbers of more bytes come first, so that all are aligned
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the file that `safetensors.torch.save_file` writes, with no copy of its tensors in memory.

    Args:
        tensors: By name, on the CPU. One that is not contiguous is copied while it is written.
        file: Is replaced.
        metadata: For the header.

    Raises:
        ExportError: The format has no name for a tensor's dtype.
        OSError: The disk did not take it; there is no file then.
    """
    unknown = next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), None)
    if unknown is not None:
        raise ExportError(f"{unknown} is of {tensors[unknown].dtype}, which safetensors files do not hold: cast it")
    ordered = sorted(tensors.items(), key=lambda one: (_ORDER[one[1].dtype], one[0]))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    try:
        with file.open("wb") as writing:
            writing.write(len(content).to_bytes(8, "little") + content)
            for _, tensor in ordered:
                writing.write(raw_bytes(tensor).numpy().data)
    except OSError:
        file.unlink(missing_ok=True)  # what is free then is told
        raise

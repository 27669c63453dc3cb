"""The client that is to load a checkpoint, `Client`, and the contents of a client's module, `Rules`.

A new client is one new module here, which defines `RULES`, and its name in `CLIENTS`. Imports no torch: the command
line lists the clients before it loads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptq_plugin.options import fields

if TYPE_CHECKING:
    from gptq_plugin.clients.inventory import Inventory
    from gptq_plugin.clients.published import Published

CLIENTS = ("vllm", "transformers", "sglang", "gptqmodel")  # names of the modules that hold their rules


@dataclass(frozen=True)
class Rules:
    """The rules of one client, on its main platform, CUDA.

    Attributes:
        problems: Called as problems(inventory, ranks): why the client refuses a checkpoint or computes something else
            with it, and what it takes instead, a sentence for each reason.
        conditions: Called as conditions(inventory): what a client that takes the checkpoint needs beside it, or does
            differently on a CPU.
        missing: Called as missing(inventory, description): what the client looks for in a `quantization_config` and
            does not find there.
        loading: Called as loading(published): the section of a model card on how the client loads the export, or why it
            does not; None if cards do not mention it.
        tensor_parallel: Several GPUs can share each layer.
    """

    problems: Callable[[Inventory, int], Iterable[str]]
    conditions: Callable[[Inventory], Iterable[str]]
    missing: Callable[[Inventory, Mapping[str, Any]], Iterable[str]]
    loading: Callable[[Published], str] | None = None
    tensor_parallel: bool = False


@dataclass(frozen=True)
class Client:
    """The client that is to load a checkpoint.

    Attributes:
        client: "vllm", "transformers", "sglang" or "gptqmodel".
        tensor_parallel_size: GPUs that share each layer; vLLM and sglang only.

    Raises:
        ValueError: There is no such client, or it cannot have such a size.
    """

    client: str
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        fields.one_of(*CLIENTS).check("target", self.client)
        fields.integer(1).check("target's tensor_parallel_size", self.tensor_parallel_size)
        if self.tensor_parallel_size > 1 and not self.rules.tensor_parallel:
            able = " and ".join(name for name in CLIENTS if rules_of(name).tensor_parallel)
            raise ValueError(f"tensor_parallel_size is for {able}; {self.client} takes whole layers")

    def __str__(self) -> str:
        parallel = f" (tensor_parallel_size={self.tensor_parallel_size})" if self.tensor_parallel_size > 1 else ""
        return f"{self.client}{parallel}"

    @property
    def rules(self) -> Rules:
        """The client's rules."""
        return rules_of(self.client)

    @classmethod
    def of(cls, value: Client | str | Mapping[str, Any] | None) -> Client | None:
        """Reads a target as users write it: a name, ``{"client": "vllm", "tensor_parallel_size": 2}``, or None.

        Raises:
            ValueError: No such client, key or size.
            TypeError: Something else.
        """
        if value is None or isinstance(value, Client):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise TypeError(f"target must be a client's name, a mapping or a Client, got {type(value).__name__}")
        if set(value) - {"client", "tensor_parallel_size"} or "client" not in value:
            raise ValueError(
                f"target has the keys client and tensor_parallel_size (1 without it); got {fields.shown(dict(value))}"
            )
        return cls(**value)


def rules_of(client: str) -> Rules:
    """The rules of one of `CLIENTS`."""
    rules: Rules = import_module(f"gptq_plugin.clients.{client}").RULES
    return rules

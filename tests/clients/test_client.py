"""Who is to load a checkpoint, as users write it, and the module that holds each client's rules."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptq_plugin.clients import client as module
from gptq_plugin.clients.client import CLIENTS, Client, Rules, rules_of


def test_a_target_is_a_name_or_a_mapping_and_nothing_else() -> None:
    assert Client.of(None) is None
    assert Client.of("vllm") == Client("vllm", 1) == Client.of(Client("vllm"))
    assert Client.of({"client": "sglang", "tensor_parallel_size": 2}) == Client("sglang", 2)
    with pytest.raises(ValueError, match=r"'vllm', 'transformers', 'sglang', 'gptqmodel'; got 'vlm'"):
        Client.of("vlm")
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        Client.of({"client": "vllm", "tp": 2})
    with pytest.raises(ValueError, match="positive integer"):
        Client("vllm", 0)
    with pytest.raises(ValueError, match="for vllm and sglang"):
        Client("transformers", 2)
    with pytest.raises(TypeError, match="int"):
        Client.of(3)  # type: ignore[arg-type]


def test_a_target_is_shown_with_the_gpus_that_share_its_layers() -> None:
    assert str(Client("vllm")) == "vllm"
    assert str(Client("vllm", 2)) == "vllm (tensor_parallel_size=2)"


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_has_its_rules_in_a_module_of_its_name(client: str) -> None:
    assert isinstance(rules_of(client), Rules) and rules_of(client) is Client(client).rules


def test_a_new_client_is_one_module_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    tgi = ModuleType("gptq_plugin.clients.tgi")
    tgi.RULES = Rules(lambda inventory, ranks: ["no"], lambda inventory: [], lambda inventory, description: [])
    monkeypatch.setitem(sys.modules, tgi.__name__, tgi)
    monkeypatch.setattr(module, "CLIENTS", (*CLIENTS, "tgi"))
    assert Client("tgi").rules is tgi.RULES
    with pytest.raises(ValueError, match="is for vllm and sglang; tgi takes whole layers"):
        Client("tgi", 2)


def test_names_of_clients_are_there_without_torch() -> None:
    code = (
        "import sys; from gptq_plugin.clients.client import Client; Client('vllm'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Ports that tests reserve: two runs of the tests on one machine do not meet."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from ports import reserved_port


def test_a_reserved_port_is_nobody_elses_and_a_store_listens_at_it():
    with reserved_port() as port, reserved_port() as another:
        assert port != another
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))  # who does not know that it is reserved
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
        store.set("key", "value")
        other = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        assert other.get("key") == b"value"

"""Ports that tests and scripts reserve: two runs on one machine do not meet."""

from __future__ import annotations

import os
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
    read, write = os.pipe()
    with reserved_port() as port:
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)

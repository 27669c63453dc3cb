"""Ports of this machine for processes that meet."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port that is nobody else's inside the block, nor as long as a process lives that was forked there.

    A socket that does not listen holds it: the kernel gives its number to no other process that asks for any port, and
    lets a server that asks for this one listen, since both allow the address to be used again (as TCPStore does).
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]

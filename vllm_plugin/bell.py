"""Workers wake the scheduling loop of their engine when a job is done, so that it need not ask them again and again.

A datagram between processes of one machine, to an address that Linux chooses. It carries nothing: whoever else sends
one makes the loop look once more.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable


class Bell:
    """The receiving end. OSError where this machine has no such sockets.

    Args:
        rung: called on a thread of this object.
    """

    def __init__(self, rung: Callable[[], None]):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(b"")
        self.address: bytes = self._socket.getsockname()
        self._rung = rung
        threading.Thread(target=self._listen, name="hubsync-bell", daemon=True).start()

    def _listen(self) -> None:
        while True:
            self._socket.recv(1)
            self._rung()


def ring(address: bytes) -> None:
    """Wake the loop at this address. Does nothing if it is on another machine, or has ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(b"!", address)
        except OSError:
            pass

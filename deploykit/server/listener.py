"""The listening socket of a server: the supervisor's, so that it outlives every worker."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from contextlib import suppress

from deploykit.errors import UsageError
from deploykit.server.settings import Settings

BACKLOG = 2048
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Classic BPF, which sees the TCP header first: keep what is no SYN, drop what begins a connection.
DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of the flags
        (0x54, 0, 0, 0x12),  # and with SYN | ACK
        (0x15, 0, 1, 0x02),  # equal to SYN?
        (0x06, 0, 0, 0),  # return 0 bytes of the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # return all of it
    )
)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket that does not block.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise UsageError(
            f"--host: expected an address of this machine, got {host!r} ({error.strerror}); "
            "127.0.0.1 serves this machine only, 0.0.0.0 all networks"
        ) from error
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: "stop the server that has it, or choose another with --port",
            errno.EACCES: "choose one above 1023 with --port",
        }.get(error.errno or 0, "choose another with --host and --port")
        raise UsageError(
            f"{host}:{port}: expected a free port, got: {os.strerror(error.errno or 0)}; {remedy}"
        ) from error
    listener.setblocking(False)
    return listener


def turn_away(listener: socket.socket) -> None:
    """Let no new connection wait; those that do are the workers'.

    A socket that is closed resets what waits at it. So nothing new may come to wait before the
    workers have taken what does: on Linux a filter drops every packet that would begin a
    connection, and its client is refused when it tries again a second later. Handshakes that have
    begun go on: to their clients they are connections already.
    """
    if sys.platform == "linux":
        code = ctypes.create_string_buffer(DROP_SYN, len(DROP_SYN))
        program = struct.pack("HP", len(DROP_SYN) // 8, ctypes.addressof(code))
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    listener.close()


def url_of(listener: socket.socket, settings: Settings) -> str:
    """Return the address at which a listening socket is reached."""
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"

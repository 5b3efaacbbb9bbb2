"""The processes of a job end together: when one fails or is gone, the others say which, and end within seconds.

Without this, a process that is killed leaves the others in a collective operation, until a time limit of the runtime
ends them with a page of its own. Every process keeps a connection to process 0, which passes on what ends.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import jax

from heirloom.common.errors import Exit, remark
from heirloom.common.processes import exchange

WELL = (Exit.DONE, Exit.STOPPED)  # exit codes of a process whose end is no failure
CONNECT = 20.0  # seconds in which processes connect to process 0
HEAR = 3.0  # seconds until word of another process must have come
OWN = 1.0  # seconds in which this process may end by itself, since bad input is often found by all at once
LINE = 10_000  # bytes that a message may have
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a host without power is noticed after 30 s


@dataclass
class _Peer:
    """A connection. process: of the other end."""

    connection: socket.socket
    process: int
    host: str

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a process that has ended needs no message
            self.connection.sendall(json.dumps(message).encode() + b"\n")


_peers: list[_Peer] = []
_ending = threading.Event()


def watch_each_other() -> None:
    """Connects all processes with process 0. Every process calls it; only the first call has an effect."""
    if jax.process_count() == 1 or _peers:
        return
    first, host = jax.process_index() == 0, socket.gethostname()
    server = socket.create_server(("", 0)) if first else None
    reachable = os.environ.get("JAX_COORDINATOR_ADDRESS", host).rpartition(":")[0] or host
    offer = [reachable, server.getsockname()[1] if server else 0, secrets.token_hex(16), host]
    hosts = [json.loads(text) for text in exchange(json.dumps(offer).encode())]
    address, port, token, _ = hosts[0]
    try:
        if server:
            with server:
                _peers.extend(_accept(server, token, [other[3] for other in hosts]))
        else:
            connection = socket.create_connection((address, port), timeout=CONNECT)
            _peers.append(_Peer(connection, 0, hosts[0][3]))
            _peers[0].send({"token": token, "process": jax.process_index()})
    except OSError as error:
        why = f"process {jax.process_index()} and process 0 at {address}:{port} do not connect ({error})"
        remark(f"{why}: if a process of this job dies, the others end only after the runtime's own time limit")
    atexit.register(_leave_at_exit)
    for peer in _peers:
        _keep_alive(peer.connection)
        threading.Thread(target=_listen, args=(peer,), name=f"process {peer.process}", daemon=True).start()


def leave(code: int, why: str = "") -> None:
    """Tells the other processes that this one ends now. code: its exit code; all but those of WELL end them as well,
    and this one at once: the runtime would wait for processes that are ending.
    """
    _ending.set()
    alone = not _peers
    for peer in _peers:
        peer.send({"process": jax.process_index(), "host": socket.gethostname(), "code": code, "why": why[: LINE // 2]})
    _peers.clear()
    if code not in WELL and not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outlive_others() -> None:
    """Lets this process end in its own time, for the last copies: the ends of others no longer end it."""
    _ending.set()


def wait_for_failure_of_others() -> None:
    """Ends this process if another one has ended, which is why an operation fails here; else returns after a while."""
    if _peers:
        time.sleep(HEAR)


def _leave_at_exit() -> None:
    error = getattr(sys, "last_value", None)  # of a program that ends with a traceback
    leave(Exit.FAILED if error else Exit.DONE, f"{type(error).__name__}: {error}")


def _accept(server: socket.socket, token: str, hosts: list[str]) -> list[_Peer]:
    """Collects the connections of all processes; others, which do not know the token, are closed."""
    found: dict[int, _Peer] = {}
    server.settimeout(CONNECT)
    while len(found) < len(hosts) - 1:
        connection, _ = server.accept()
        connection.settimeout(5.0)
        message = _receive(connection)
        process = message.get("process")
        if message.get("token") == token and isinstance(process, int):
            found[process] = _Peer(connection, process, hosts[process])
        else:
            connection.close()
    return list(found.values())


def _listen(peer: _Peer) -> None:
    while not _ending.is_set():
        message = _receive(peer.connection)
        if _ending.is_set():
            return
        if not message:
            message = {"process": peer.process, "host": peer.host, "code": Exit.LOST, "why": "has ended without a word"}
        if message["code"] in WELL:
            return
        for other in _peers:
            if other is not peer:
                other.send(message)
        if message["code"] == Exit.BAD_INPUT and _ending.wait(OWN):
            return
        why, who = message["why"], f"process {message['process']} on {message['host']}"
        said = f"{who} {why}: see its own output" if message["code"] == Exit.LOST else f"{who} failed: {why}"
        print(f"heirloom: {said}", file=sys.stderr, flush=True)
        os._exit(message["code"])  # the main thread waits for the other process, and cannot be woken


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Returns the next message; an empty one at the end of the connection, and for anything else."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < LINE:
            if not (part := connection.recv(1)):
                return {}
            line += part
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # the names differ on macOS, whose own times are longer
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

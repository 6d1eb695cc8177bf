"""Faults of the network between the ranks of a gang, made by one of them; what else they are connected with stays as it is.

cut: the connections close, and both ends hear of it. deaf: nothing that the others send gets here any more, and nobody is
told: as when a cable is pulled.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

SO_ATTACH_FILTER = 26


class Instruction(ctypes.Structure):
    """Of a packet filter in the kernel."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction)))


def cut(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def deafen(connection: socket.socket) -> None:
    """A filter that lets through 0 bytes of each packet."""
    drop = (Instruction * 1)(Instruction(0x06, 0, 0, 0))
    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(Program(1, drop)))


ACTIONS: dict[str, Callable[[socket.socket], None]] = {"cut": cut, "deaf": deafen}


def tell(folder: Path) -> None:
    """Leaves word that this process is a rank."""
    (folder / f"rank.{os.getpid()}").touch()


def strike(action: str, folder: Path) -> None:
    struck = list(connections(folder))
    assert struck, "this rank has no connections with others"
    for connection in struck:
        with connection:
            ACTIONS[action](connection)


def connections(folder: Path) -> Iterator[socket.socket]:
    """Of this rank with other ones."""
    others = {int(path.suffix[1:]) for path in folder.glob("rank.*")} - {os.getpid()}
    ports = {c.laddr.port for c in psutil.net_connections("tcp") if c.pid in others and c.laddr}
    for c in psutil.Process().net_connections("tcp"):
        if c.status == psutil.CONN_ESTABLISHED and c.raddr.port in ports:
            yield socket.socket(fileno=os.dup(c.fd))

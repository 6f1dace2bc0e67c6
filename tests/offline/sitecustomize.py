"""Refuses every connection that leaves the machine; Python runs this file first where its folder is in PYTHONPATH.

Sees what Python code asks the socket module for, not what a C++ library does by itself, as gloo does between processes.
Who is asked is written to the file $OFFLINE_LOG, since a library may catch the error.
"""

import ipaddress
import os
import socket
import sys

# Event -> which of its arguments holds the address or name.
ASKS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
}


def is_local(host: object) -> bool:
    if isinstance(host, (bytes, bytearray)):
        host = host.decode(errors="replace")
    if not isinstance(host, str) or host in ("", "localhost", socket.gethostname()):
        return True  # None and "" mean this machine
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False  # a name, which some server would have to resolve
    return address.is_loopback or address.is_unspecified


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event not in ASKS:
        return
    place = arguments[ASKS[event]]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(place, tuple):
            return  # the path of a socket on this machine, or one that is connected
        place = place[0]
    if is_local(place):
        return
    if "OFFLINE_LOG" in os.environ:
        with open(os.environ["OFFLINE_LOG"], "a") as log:
            log.write(f"{place}\n")
    raise RuntimeError(f"{event} {place!r}: tests need no network, only this machine may be asked; use a local file")


sys.addaudithook(refuse)

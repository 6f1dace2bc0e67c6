"""The guard that keeps every test on this machine."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

ELSEWHERE = "192.0.2.1"  # belongs to nobody (RFC 5737)
SWALLOWED = f"""
import socket
try:
    socket.create_connection(("{ELSEWHERE}", 80), timeout=1)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("ask", "host"),
    [
        (lambda: socket.create_connection((ELSEWHERE, 80), timeout=1), ELSEWHERE),
        (lambda: socket.socket().connect((ELSEWHERE, 80)), ELSEWHERE),
        (lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)), "2001:db8::1"),
        (lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (ELSEWHERE, 53)), ELSEWHERE),
        (lambda: socket.getaddrinfo("huggingface.co", 443), "huggingface.co"),
        (lambda: socket.gethostbyname("huggingface.co"), "huggingface.co"),
    ],
)
def test_other_machines_are_refused(ask: Callable[[], object], host: str, refused: Callable[[], list[str]]) -> None:
    with pytest.raises(RuntimeError, match=f"{host}.*tests need no network"):
        ask()
    assert refused() == [host]


def test_python_processes_that_a_test_starts_are_refused_too(refused: Callable[[], list[str]]) -> None:
    said = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=True).stdout
    assert "tests need no network" in said
    assert refused() == [ELSEWHERE], "told, though the error was caught"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_may_be_asked(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection((host, server.getsockname()[1])) as client:
            client.sendall(b"here")
            assert server.accept()[0].recv(4) == b"here"

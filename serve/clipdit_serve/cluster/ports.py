"""Ports, before Ray takes one: it says what is wrong with them late and at length."""

import socket


def free_port(host: str) -> int:
    with _bound(host, 0) as bound:
        return bound.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """ValueError where nobody can listen."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}. Choose another --port") from None


def address_of(host: str, port: int) -> str:
    """http://HOST:PORT."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound

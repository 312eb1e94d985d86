"""A run on one machine without GPUs listens on the loopback interface only.

Whoever reaches a port of Ray runs code as its user, and torch's store and gloo ask nobody who they are. Left alone, Ray and the
store listen on every interface of the machine, and gloo on the one that the host's name stands for.
"""

from __future__ import annotations

import socket
from typing import Any

ENV_VARS = {"GLOO_SOCKET_IFNAME": "lo"}
"""For the processes of a run whose Ray is its own."""


def keep_ray_on_loopback() -> None:
    """The next `ray.init` that starts a cluster here takes 127.0.0.1 for its node's address: Ray's servers listen there only, and
    OpenRLHF, which asks Ray for the address, makes it that of its rendezvous. (Of `_node_ip_address` Ray takes no 127.0.0.1.)"""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket of that address, for a `TCPStore` to take over: those that it opens itself listen everywhere."""
    return socket.create_server((host, port))


def store_at_its_address(tcp_store: Any) -> Any:
    """`torch.distributed.TCPStore`, called by keywords as torch's rendezvous does, that listens at its `host_name` only."""

    def store(*, host_name: str, port: int, is_master: bool, **kwargs: Any) -> Any:
        listener = {"master_listen_fd": listen_at(host_name, port).detach()} if is_master else {}
        return tcp_store(host_name=host_name, port=port, is_master=is_master, **listener, **kwargs)

    return store

"""What the environment says of clusters and networks: an address to use or none, interfaces that a user has chosen."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from cluster import actor, session
from cluster.actor import INTERFACES, interface, talk_through
from cluster.tasks import ClusterError


@pytest.mark.parametrize(("address", "ours"), [(None, True), ("", True), ("local", True), ("10.0.0.1:6379", False)])
def test_a_cluster_of_our_own_asks_for_a_token(
    address: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {} if address is None else {"RAY_ADDRESS": address})
    monkeypatch.delitem(sys.modules, "ray")
    session.guard()
    assert (os.environ.get("RAY_AUTH_MODE") == "token") is ours
    assert ("RAY_AUTH_TOKEN" in os.environ) is ours
    assert (session.ARENAS in os.environ) is ours and bool(session.of_ranks()) is not ours
    assert bool(session.address()) is not ours


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with loopback and one card."""
    held = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {k: [Held(address)] for k, address in held.items()})


class Held:
    def __init__(self, address: str):
        self.address = address


@pytest.mark.usefixtures("cards")
def test_an_interface_that_the_user_has_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor.os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    talk_through({"10.0.0.5", "10.0.0.6"}, "10.0.0.5")
    assert [os.environ[variable] for variable in INTERFACES] == ["eth0", "ib0"]


@pytest.mark.usefixtures("cards")
def test_who_has_chosen_both_needs_none_that_holds_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor.os, "environ", dict.fromkeys(INTERFACES, "ib0"))
    talk_through({"203.0.113.8", "203.0.113.9"}, "203.0.113.9")
    assert os.environ == dict.fromkeys(INTERFACES, "ib0")


@pytest.mark.usefixtures("cards")
def test_an_address_that_no_interface_holds_is_named() -> None:
    assert interface({"10.0.0.5"}, "10.0.0.5") == "lo"
    said = (
        r"none of its network interfaces \(eth0, lo\) holds its address 203.0.113.9; name one in GLOO_SOCKET_IFNAME and"
    )
    with pytest.raises(ClusterError, match=said):
        interface({"a", "b"}, "203.0.113.9")

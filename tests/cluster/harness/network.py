"""Pods' network on nodes that come without one: a pair of interfaces for each pod, and routes.

It connects pods, Services and the world outside; it does not enforce NetworkPolicies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.harness import daemon

PODS = "10.244.0.0/16"
_FOLDER = "/etc/cni/net.d"


@dataclass(frozen=True)
class NodeAddress:
    """A node, its own address and the range of its pods."""

    name: str
    address: str
    pods: str


def addresses(nodes: Sequence[Mapping[str, Any]]) -> list[NodeAddress]:
    """From the API server's Node objects."""
    found = []
    for node in nodes:
        own = next(a for a in node["status"]["addresses"] if a["type"] == "InternalIP")
        found.append(NodeAddress(node["metadata"]["name"], own["address"], node["spec"]["podCIDR"]))
    return found


def connect(nodes: Sequence[NodeAddress]) -> None:
    """Configure each node's pods, and tell each node the way to the others'."""
    for node in nodes:
        commands = [f"cat >{_FOLDER}/10-pods.conflist"]
        commands += [
            f"ip route replace {other.pods} via {other.address}" for other in nodes if other != node
        ]
        # What leaves the cluster leaves as the node.
        rule = f"POSTROUTING -s {node.pods} ! -d {PODS} -j MASQUERADE"
        commands.append(f"iptables -w -t nat -C {rule} 2>/dev/null || iptables -w -t nat -A {rule}")
        configuration = json.dumps(_configuration(node.pods)).encode()
        script = " && ".join(f"({command})" for command in commands)
        daemon.docker("exec", "-i", node.name, "sh", "-euc", script, stdin=configuration)


def name_service(servers: Sequence[str]) -> dict[str, Any]:
    """CoreDNS's configuration, as a ConfigMap.

    kubeadm's own asks the node's resolver for the names of the world outside, which is docker's, on
    the node's loopback: a pod that asks it asks itself.

    Args:
        servers: Whom to ask for those names; nobody if empty.
    """
    lines = [
        "errors",
        "health",
        "ready",
        "kubernetes cluster.local in-addr.arpa ip6.arpa {",
        "    pods insecure",
        "    fallthrough in-addr.arpa ip6.arpa",
        "    ttl 5",
        "}",
        *([f"forward . {' '.join(servers)}"] if servers else []),
        "cache 5",
        "loadbalance",
    ]
    corefile = "".join(f"    {line}\n" for line in lines)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "coredns", "namespace": "kube-system"},
        "data": {"Corefile": f".:53 {{\n{corefile}}}\n"},
    }


def _configuration(pods: str) -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        # Forgotten when the node starts anew, as its pods are.
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }

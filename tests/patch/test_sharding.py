"""A model sharded over two ranks (ring backend on loopback) keeps its all-reduce when patched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

RANK = Path(__file__).with_name("sharded_rank.py")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def test_two_ranks_agree_with_the_whole_model(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK)],
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hosts),
                "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for out, _ in outputs:
        result = json.loads(out.splitlines()[-1])
        assert result["size"] == 2
        # The block with the all-reduce and its experts are replaced, on the sharded weights.
        assert result["patched"]["moe_mlp"] == 2
        # Without the all-reduce half of every sum would be missing.
        assert result["stock_error"] < 1e-5
        assert result["patched_error"] < 1e-5
        assert result["same_on_all_ranks"]
        assert result["restored"]

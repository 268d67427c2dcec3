"""A Ray head node whose GCS keeps its tables in a given Redis and can be killed and started by a word on stdin.

python -m tests.chaos.head redis://:password@host:port/0 FOLDER     prints the cluster's address
"""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit


def main(url: str, folder: str) -> None:
    parts = urlsplit(url)
    os.environ["RAY_REDIS_ADDRESS"] = f"{parts.hostname}:{parts.port}"
    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "60"  # noqa: SIM112  # Ray's own spelling
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 16,
            "include_dashboard": False,
            "object_store_memory": 200_000_000,
            "temp_dir": folder,
            "redis_password": parts.password or "",
        },
    )
    print(cluster.address, flush=True)
    for word in sys.stdin:
        if word.strip() == "kill":
            cluster.head_node.kill_gcs_server()
        else:
            cluster.head_node.start_gcs_server()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

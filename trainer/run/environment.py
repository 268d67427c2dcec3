"""Environment variables of a run's processes. Must be set before `ray` is first imported: it reads some of them then."""

from __future__ import annotations

import os
import secrets

QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: several processes share few cores
    "GLOG_minloglevel": "2",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
EXACT = {
    # with AMX, oneDNN's bfloat16 products of torch 2.13 were off by the size of the result on a virtual Xeon; AVX-512's are not
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
}
PATIENT = {
    # Serve gives its HTTP proxy 5 s to come up and then starts it anew, which on a busy machine it may do for ever
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
ALONE = {
    # it watches for nodes that are taken away; a local cluster is one machine, and every process more delays the start
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def prepare(ray_address: str | None) -> None:
    """Quiet logs, arithmetic that is right; and for a local cluster, a token of its own, so that nobody else on the machine can submit to it."""
    for name, value in (QUIET | EXACT | PATIENT).items():
        os.environ.setdefault(name, value)
    if ray_address is None:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

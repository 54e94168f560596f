"""The settings file of pods, and what they share, from the operator's own settings."""

import math
from typing import Any, Final

import tomlkit

from casparian_flow.config import Settings, TrustSettings
from casparian_flow.kube import names
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.manifests_common import (
    INDEX_CA_PATH,
    WHEELHOUSE_PATH,
    WORKER_METRICS_PORT,
    Site,
)
from casparian_flow.protocol.curve import public_text

EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - in a pod, whose port others reach as NetworkPolicy says


def site_of(settings: Settings, namespace: str, keys: KeyRing) -> Site:
    """What every pod of this installation shares.

    Args:
        namespace: the operator's own.
    """
    own = settings.operator
    host = own.sentinel_host or f"{own.name}-sentinel.{namespace}.svc"
    return Site(
        name=own.name,
        namespace=namespace,
        image=own.worker_image,
        sentinel=f"tcp://{host}:{names.WORKER_PORT}",
        control=f"tcp://{host}:{names.CONTROL_PORT}",
        settings_toml=pod_settings(settings),
        server_key=public_text(keys.server.public),
        pull_policy=own.image_pull_policy,
        pull_secrets=own.image_pull_secrets,
        job_timeout_s=settings.worker.job_timeout_seconds,
        network_policies=own.network_policies,
        storage_class=own.environments_storage_class,
        environments_size=own.environments_size,
        index_ca_config_map=own.index_ca_config_map,
        wheelhouse_claim=own.wheelhouse_claim,
        worker_resources=own.worker_resources,
        slots=settings.worker.slots or 1,
        memory_mb=settings.worker.memory_mb,
        scratch_size=own.scratch_size,
        log_level=settings.logging.level,
        log_format=settings.logging.format,
    )


def pod_settings(settings: Settings) -> str:
    """`config.toml` of workers, provisioning and Scouts; equal settings give equal text."""
    own, worker = settings.operator, settings.worker
    sections: dict[str, Any] = {
        "worker": {
            "slots": worker.slots or 1,
            "scratch": names.SCRATCH_PATH,
            "cache_dir": names.ENVIRONMENTS_PATH,
            "environments_read_only": True,
            "job_timeout_seconds": worker.job_timeout_seconds,
            "memory_mb": worker.memory_mb,
            "pids": worker.pids,
            "log_kb": worker.log_kb,
            "recycle_after": worker.recycle_after,
            "drain_seconds": float(math.ceil(worker.job_timeout_seconds)),
            "metrics_port": WORKER_METRICS_PORT,
            "metrics_host": EVERYWHERE,
            "index_url": own.index_url,
        },
        "wire": {"curve_dir": names.CURVE_PATH, "token_file": names.TOKEN_FILE},
        "logging": {"level": settings.logging.level, "format": settings.logging.format},
        "trust": trust_section(settings.trust),
    }
    if own.index_ca_config_map:
        sections["worker"]["ca_file"] = f"{INDEX_CA_PATH}/ca.crt"
    if own.wheelhouse_claim:
        sections["worker"]["wheelhouse"] = WHEELHOUSE_PATH
    if settings.sandbox.require is not None:
        sections["sandbox"] = {"require": list(settings.sandbox.require)}
    mssql = settings.sinks.mssql
    if mssql.server:
        # Never the password: that comes from a Secret, as a variable of the worker's container.
        public = {"server", "port", "user", "database"}
        sections["sinks"] = {"mssql": mssql.model_dump(include=public)}
    return tomlkit.dumps(sections, sort_keys=True)


def trust_section(trust: TrustSettings) -> dict[str, Any]:
    """Whom pods trust: the public keys alone, and what was revoked."""
    return {
        "allowed_signers": sorted(trust.allowed_signers),
        "allow_unsigned": trust.allow_unsigned,
        "gatekeeper": trust.gatekeeper,
        "libraries": sorted(trust.libraries),
        "keys": {
            signer: [key.model_dump(exclude_none=True) for key in keys]
            for signer, keys in sorted(trust.keys.items())
        },
        "revoked": dict(sorted(trust.revoked.items())),
    }

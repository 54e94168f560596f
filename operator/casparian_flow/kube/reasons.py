"""Condition types, their reasons, and the reasons of Events: words that machines may rely on.

A condition's reason says why it is as it is, in one word; its message says so to people. A word
once here keeps its meaning. An Event has the reason of the condition that it tells of, or one of
`EventReason`.
"""

from enum import StrEnum
from typing import Final


class ConditionType(StrEnum):
    """What is judged; the comment says what `True` means."""

    VERIFIED = "Verified"
    """CasparianPlugin: the bundle of `spec.source` may run here: read, signed by somebody who is
    trusted for it, found harmless by the Gatekeeper, and no other bytes have this version."""
    PROVISIONED = "Provisioned"
    """CasparianPlugin: the environment of the version's lock file is there to be mounted."""
    DEPLOYED = "Deployed"
    """CasparianPlugin: the version is the active one in the ledger, and its workers' Deployment is
    as it should be."""
    READY = "Ready"
    """CasparianPlugin: a job could run now; also at zero replicas. SourceRoot: scans take place."""
    SCANNED = "Scanned"
    """SourceRoot: the last scan walked through all of it."""
    DECIDED = "Decided"
    """Approval: approved or rejected."""
    STARTED = "Started"
    """Approval: what was approved has begun; `status.jobId` names the API job."""


class VerifiedReason(StrEnum):
    """Why a plugin is Verified, or not."""

    VERIFIED = "Verified"
    """The bundle may run here."""
    SOURCE_MISSING = "SourceMissing"
    """The ConfigMap, or the key in it, is not there (yet)."""
    DIGEST_MISMATCH = "DigestMismatch"
    """The ConfigMap holds another bundle than `digest` says."""
    BUNDLE_UNREADABLE = "BundleUnreadable"
    """Not base64, not gzip, or no bundle."""
    VERSION_MISMATCH = "VersionMismatch"
    """The bundle holds another version than `spec.version` says."""
    VERSION_REUSED = "VersionReused"
    """This version was deployed before with other bytes; versions are immutable."""
    PLUGIN_CHANGED = "PluginChanged"
    """The bundle is of another plugin than the object's earlier versions."""
    NAME_TAKEN = "NameTaken"
    """Another CasparianPlugin of the namespace, the older one, has a plugin of this name."""
    UNSIGNED = "Unsigned"
    """The bundle has no signature, and one is required."""
    UNKNOWN_SIGNER = "UnknownSigner"
    """The key is not among the trusted ones."""
    BAD_SIGNATURE = "BadSignature"
    """The signature does not hold over these bytes."""
    OUT_OF_SCOPE = "OutOfScope"
    """The key is trusted, but not for a plugin of this name."""
    KEY_NOT_VALID = "KeyNotValid"
    """The key's time has not begun, or is over."""
    KEY_REVOKED = "KeyRevoked"
    """The key was revoked, and counts for nothing any more."""
    GATEKEEPER_REFUSED = "GatekeeperRefused"
    """The source does what the trust profile does not allow."""
    MANIFEST_REFUSED = "ManifestRefused"
    """The plugin's MANIFEST, or what the object sets beside it, cannot be deployed."""


class ProvisionedReason(StrEnum):
    """Why a plugin is Provisioned, or not."""

    PROVISIONED = "Provisioned"
    """It is there, every file of it checked by its hash."""
    NOT_NEEDED = "NotNeeded"
    """The plugin has no lock file: it runs on what the worker image holds."""
    PROVISIONING = "Provisioning"
    """The Job that installs is under way."""
    IN_POD = "InPod"
    """There is no shared volume: an init container of each worker pod installs."""
    PROVISION_FAILED = "ProvisionFailed"
    """The message is uv's own."""
    WAITING = "Waiting"
    """For Verified."""


class DeployedReason(StrEnum):
    """Why a plugin is Deployed, or not."""

    DEPLOYED = "Deployed"
    """The wanted version runs, or would."""
    ON_TRIAL = "OnTrial"
    """A worker loads the version, and runs it over its samples, before it becomes active."""
    TRIAL_FAILED = "TrialFailed"
    """It failed its trial; the version before it stays active."""
    ROLLING_OVER = "RollingOver"
    """The earlier version's workers finish what they have."""
    UNSAFE_OUTPUTS = "UnsafeOutputs"
    """A SQLite or DuckDB file would be written by several workers."""
    NO_OUTPUT_VOLUME = "NoOutputVolume"
    """A sink writes files, and `workers.outputs` names no volume to keep them."""
    SOURCE_ROOT_MISSING = "SourceRootMissing"
    """A name in `sourceRoots` belongs to no SourceRoot of the namespace."""
    OBJECT_REFUSED = "ObjectRefused"
    """The API server refuses an object that is needed; the message is its own."""
    LEDGER_REFUSED = "LedgerRefused"
    """The ledger does not take what the object asks for; the message says why. It is asked again
    from time to time."""
    WAITING = "Waiting"
    """For Verified or Provisioned."""


class ReadyReason(StrEnum):
    """Why a plugin or source root is Ready, or not."""

    READY = "Ready"
    """Nothing stands in the way."""
    SUSPENDED = "Suspended"
    """By `spec.suspend`."""
    NOT_VERIFIED = "NotVerified"
    """Verified is not True; its message says why."""
    NOT_PROVISIONED = "NotProvisioned"
    """Provisioned is not True; its message says why."""
    NOT_DEPLOYED = "NotDeployed"
    """Deployed is not True; its message says why."""
    PODS_FAILING = "PodsFailing"
    """Worker pods do not start or do not stay; the message is a pod's own."""
    PAUSED = "Paused"
    """The plugin is paused in the ledger; the message says why, and how to resume it."""
    VOLUME_MISSING = "VolumeMissing"
    """The claim is not there."""
    VOLUME_ON_TWO_NODES = "VolumeOnTwoNodes"
    """A ReadWriteOnce claim is wanted on two nodes; the message names who holds it where."""
    PINNED = "Pinned"
    """Ready, with pods held to the one node where a ReadWriteOnce claim is mounted."""
    OBJECT_REFUSED = "ObjectRefused"
    """The API server refuses the source root's CronJob or what goes with it; the message is its
    own."""
    LEDGER_REFUSED = "LedgerRefused"
    """The ledger does not take what the object asks for; the message says why. It is asked again
    from time to time."""


class ScannedReason(StrEnum):
    """Why a source root is Scanned, or not."""

    SCANNED = "Scanned"
    """Every file that is there was seen."""
    NEVER_SCANNED = "NeverScanned"
    """No scan has ended yet."""
    INCOMPLETE = "Incomplete"
    """Some of it could not be read; the message tells what."""
    SCAN_FAILED = "ScanFailed"
    """The last scan ended early; the message is its own."""


class DecidedReason(StrEnum):
    """Why an approval is Decided, or not."""

    APPROVED = "Approved"
    """Somebody has approved it; `spec.decidedBy` says who."""
    REJECTED = "Rejected"
    """Somebody has rejected it; `spec.decidedBy` and `spec.reason` say who and why."""
    PENDING = "Pending"
    """It waits for a person."""
    EXPIRED = "Expired"
    """Nobody decided in time."""
    STALE = "Stale"
    """What was asked for is not what is there any more; it will never start a job."""
    LEDGER_REFUSED = "LedgerRefused"
    """The ledger does not take what the object asks for; the message says why. It is asked again
    from time to time."""


class StartedReason(StrEnum):
    """Why an approval is Started, or not."""

    STARTED = "Started"
    """It has begun."""
    NOT_APPROVED = "NotApproved"
    """It is not approved, so nothing starts."""
    STARTING = "Starting"
    """It is approved, and its job is being made."""
    STALE = "Stale"
    """What was asked for had changed between the decision and the start."""
    NO_JOB = "NoJob"
    """The operation is no job: the decision is all."""


class EventReason(StrEnum):
    """Reasons of Events that tell of no condition."""

    REPAIRED = "Repaired"
    """An object of ours had been deleted or edited, and was put right."""
    SCAN_REQUESTED = "ScanRequested"
    """The annotation `casparian.io/scan` asked for a scan at once."""


VERIFIED_BY_TRUST_CODE: Final = {
    "trusted": VerifiedReason.VERIFIED,
    "unsigned": VerifiedReason.UNSIGNED,
    "unknown_signer": VerifiedReason.UNKNOWN_SIGNER,
    "unknown_key": VerifiedReason.UNKNOWN_SIGNER,
    "bad_signature": VerifiedReason.BAD_SIGNATURE,
    "hash_mismatch": VerifiedReason.BAD_SIGNATURE,
    "name_mismatch": VerifiedReason.BAD_SIGNATURE,
    "version_mismatch": VerifiedReason.BAD_SIGNATURE,
    "malformed": VerifiedReason.BAD_SIGNATURE,
    "out_of_scope": VerifiedReason.OUT_OF_SCOPE,
    "not_yet_valid": VerifiedReason.KEY_NOT_VALID,
    "expired": VerifiedReason.KEY_NOT_VALID,
    "revoked": VerifiedReason.KEY_REVOKED,
}
"""The reason for each `trust.policy.Code`."""

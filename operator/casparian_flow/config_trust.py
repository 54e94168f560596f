"""The `[trust]` section as the rules that it describes, read anew whenever its file changes."""

import threading
from datetime import UTC, datetime
from pathlib import Path

from casparian_flow.config import Settings, TrustedKeySettings, TrustSettings, load_settings
from casparian_flow.domain.errors import CasparianError, ConfigError
from casparian_flow.trust.gatekeeper_lists import DEFAULT_WHITELIST, Profile
from casparian_flow.trust.keys import parse_public
from casparian_flow.trust.policy import TrustedKey, TrustPolicy
from casparian_flow.trust.rules import TrustRules, TrustSource

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def trust_source(settings: Settings) -> TrustSource:
    """The rules that these settings' file holds, as it is at each call."""
    if settings.file is None:
        rules = rules_of(settings.trust)
        return lambda: rules
    return _Reader(settings.file, settings)


class _Reader:
    """Reads the file again when it has changed; for any number of threads."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._seen = _stamp(file)
        self._rules = rules_of(settings.trust)

    def __call__(self) -> TrustRules:
        """Raises:
        ConfigError: the file cannot be used as it now is.
        """
        with self._lock:
            # Looked at before reading: a change in between is then seen at the next call.
            stamp = _stamp(self._file)
            if stamp != self._seen:
                self._rules = rules_of(load_settings(self._file).trust)
                self._seen = stamp
            return self._rules


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def rules_of(settings: TrustSettings) -> TrustRules:
    """The rules that a `[trust]` section describes.

    Raises:
        ConfigError: a key, a time or the policy as a whole makes no sense.
    """
    try:
        policy = TrustPolicy(
            allowed_signers=settings.allowed_signers,
            keys={
                signer: tuple(_trusted(key) for key in keys)
                for signer, keys in settings.keys.items()
            },
            revoked=settings.revoked,
            allow_unsigned=settings.allow_unsigned,
        )
    except CasparianError as error:
        raise ConfigError(f"section [trust]: {error}", hint=error.hint) from error
    libraries = DEFAULT_WHITELIST | frozenset(settings.libraries)
    return TrustRules(policy, Profile(settings.gatekeeper), libraries)


def _trusted(key: TrustedKeySettings) -> TrustedKey:
    return TrustedKey(
        parse_public(key.public), key.scopes, _micros(key.not_before), _micros(key.not_after)
    )


def _micros(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    # A time without a zone is UTC, as everywhere in the ledger.
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int((aware - _EPOCH).total_seconds() * 1_000_000)

"""What can be wrong with keys, bundles and signatures."""

from casparian_flow.domain.errors import CasparianError, UsageError


class BundleError(UsageError):
    """A file or message is no bundle, or one that was cut off or altered."""


class EnvelopeError(UsageError):
    """An envelope is not of the form that docs/trust.md describes, or its signature is wrong."""


class KeyFileError(UsageError):
    """A key cannot be read, written or used."""


class PolicyError(UsageError):
    """A trust policy contradicts itself or has values out of range."""


class UntrustedError(CasparianError):
    """The trust policy refuses a plugin version.

    Attributes:
        code: a policy.Code value, for machines.
    """

    exit_code = 8

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class GatekeeperError(UsageError):
    """A plugin's source does what the Gatekeeper's profile does not allow."""

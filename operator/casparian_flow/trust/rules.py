"""What a side of the system asks of a plugin version before it stores or runs it.

`TrustRules` joins the policy (who may sign what) and the Gatekeeper (what the source may do). Both
Sentinel and worker hold a `TrustSource`, which gives the rules as they are now, so that a key
revoked in the configuration counts from the next load on.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache

from casparian_flow.domain.wording import counted
from casparian_flow.trust.bundle import Bundle
from casparian_flow.trust.errors import GatekeeperError
from casparian_flow.trust.gatekeeper import inspect
from casparian_flow.trust.gatekeeper_findings import Finding
from casparian_flow.trust.gatekeeper_lists import DEFAULT_WHITELIST, Profile
from casparian_flow.trust.policy import TrustPolicy, Verdict

FINDINGS_TOLD = 20
"""Most findings that one message lists."""


@dataclass(frozen=True, slots=True)
class TrustRules:
    """The rules in force.

    Attributes:
        profile: how strictly the Gatekeeper reads.
        libraries: what may be imported, by the names used in imports.
    """

    policy: TrustPolicy = field(default_factory=TrustPolicy)
    profile: Profile = Profile.STRICT
    libraries: Collection[str] = DEFAULT_WHITELIST

    def require(self, bundle: Bundle, *, deployed_at_us: int) -> Verdict:
        """Check signature, hash and source of a plugin version.

        Args:
            deployed_at_us: when the Sentinel recorded the deploy, or now while deploying.

        Raises:
            UntrustedError: the policy refuses it; the message names what does not match.
            GatekeeperError: its source breaks a rule.
        """
        verdict = self.policy.check(bundle, deployed_at_us=deployed_at_us).require()
        self.require_source(bundle.source, f"{bundle.name}.py")
        return verdict

    def require_source(self, source: str, name: str) -> None:
        """Check a source alone.

        Args:
            name: what messages call it.

        Raises:
            GatekeeperError: it breaks a rule.
        """
        findings = _inspected(source, self.profile, frozenset(self.libraries))
        if findings:
            raise GatekeeperError(told(findings, name), hint=_HINT)


_HINT = "docs/trust.md explains every rule; [trust] gatekeeper and libraries change them."

TrustSource = Callable[[], TrustRules]
"""Gives the rules as they now are.

Raises:
    CasparianError: they cannot be read; nothing may be trusted then.
"""


def nobody() -> TrustRules:
    """Rules that trust nobody: of whoever was given none."""
    return TrustRules()


def told(findings: Collection[Finding], name: str) -> str:
    """Findings as a message: how many, then one a line with its place and rule."""
    lines = [f"{name}:{f.line}:{f.col}: {f.rule_id} {f.message}" for f in findings]
    if len(lines) > FINDINGS_TOLD:
        lines[FINDINGS_TOLD:] = [f"and {len(lines) - FINDINGS_TOLD} more"]
    return "\n  ".join(
        [f"the Gatekeeper refuses {name}: {counted(len(findings), 'finding')}", *lines]
    )


@lru_cache(maxsize=256)
def _inspected(source: str, profile: Profile, libraries: frozenset[str]) -> tuple[Finding, ...]:
    # The same sources are asked about at every load, and a large one takes seconds.
    return tuple(inspect(source.encode("utf-8", "surrogatepass"), profile, libraries))

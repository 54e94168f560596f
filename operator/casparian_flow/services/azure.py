"""Who publishes, as Azure AD says: the device code flow, and a check of the token it ends with.

    publisher ── opens the address, types the code ── Azure AD
    casparian ── asks again and again ── token ── signature, audience, tenant, group ── Identity

msal speaks the protocol (interval, slow_down, the refresh of tokens). It does not verify the
signature of an ID token, so that is done here, with the keys that the authority publishes.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casparian_flow.config import AzureSettings
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.trust.envelope import Identity

if TYPE_CHECKING:
    import msal

SCOPES = ["User.Read"]
CACHE_NAME = "azure_tokens.json"
CACHE_BYTES_MAX = 1 << 20
TIMEOUT_S = 30.0
_ALGORITHMS = ["RS256"]
_LEEWAY_S = 300.0
"""How far the clocks of publisher and authority may be apart."""


class AuthenticationError(CasparianError):
    """Azure AD did not say who the publisher is, or it is not one who may publish."""

    exit_code = 8


@dataclass(frozen=True, slots=True)
class Directory:
    """Where to ask.

    Attributes:
        authority: an https address with the tenant as its path.
        group: id of a group that the publisher must be in, "" for none.
    """

    tenant_id: str
    client_id: str
    authority: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who was authenticated, with the name that people know."""

    name: str
    identity: Identity


def directory_of(settings: AzureSettings, variables: Mapping[str, str]) -> Directory | None:
    """Where publishers are authenticated; None if that is not wanted.

    Raises:
        UsageError: only one of tenant and client is known.
    """
    tenant = settings.tenant_id or variables.get("AZURE_TENANT_ID", "")
    client = settings.client_id or variables.get("AZURE_CLIENT_ID", "")
    if not tenant and not client:
        return None
    if not tenant or not client:
        raise UsageError(
            "Azure AD wants both a tenant and a client, and only one is set",
            hint="Set AZURE_TENANT_ID and AZURE_CLIENT_ID, or unset both to use a local key alone.",
        )
    authority = settings.authority or f"https://login.microsoftonline.com/{tenant}"
    return Directory(tenant, client, authority.rstrip("/"), settings.group)


def authenticate(directory: Directory, cache_file: Path, tell: Callable[[str], None]) -> Publisher:
    """Find out who publishes: from the token cache, else by a code that is typed in a browser.

    Args:
        cache_file: tokens are kept there, mode 0600.
        tell: shows the code and the address.

    Raises:
        AuthenticationError: declined, expired, refused, or the token is not sound.
        UsageError: msal is not installed, or the cache cannot be used.
    """
    try:
        import jwt
        import msal
        import requests
    except ImportError as error:
        raise UsageError(
            "authentication by Azure AD needs a library that is not installed",
            hint="Install casparian-flow[azure].",
        ) from error
    cache = msal.SerializableTokenCache()
    _load(cache, cache_file)
    try:
        app = msal.PublicClientApplication(
            directory.client_id,
            authority=directory.authority,
            instance_discovery=False,
            token_cache=cache,
            timeout=TIMEOUT_S,
        )
        token = _refreshed(app) or _by_device_code(app, tell)
        claims = _verified(directory, str(token["id_token"]))
    except (requests.RequestException, ValueError, TypeError) as error:
        raise AuthenticationError(
            f"the authority {directory.authority} cannot be used: {error}",
            hint="Check AZURE_TENANT_ID, the network, and [trust.azure].",
        ) from error
    except jwt.PyJWTError as error:
        raise AuthenticationError(
            f"the token that {directory.authority} gave is not sound: {error}",
            hint="Check [trust.azure] authority, and this machine's clock.",
        ) from error
    publisher = _publisher(directory, claims)
    _save(cache, cache_file)
    return publisher


def _refreshed(app: "msal.PublicClientApplication") -> dict[str, Any] | None:
    """A fresh token for somebody who has signed in before; None asks for the code."""
    for account in app.get_accounts():
        result = app.acquire_token_silent(SCOPES, account=account, force_refresh=True)
        if isinstance(result, dict) and "id_token" in result:
            return result
    return None


def _by_device_code(
    app: "msal.PublicClientApplication", tell: Callable[[str], None]
) -> dict[str, Any]:
    flow = app.initiate_device_flow(scopes=SCOPES)
    if "user_code" not in flow:
        raise _refusal(flow)
    tell(f"open {flow['verification_uri']} in a browser and type the code {flow['user_code']}")
    result = app.acquire_token_by_device_flow(flow)
    if "id_token" not in result:
        raise _refusal(result)
    return dict(result)


_REFUSALS = {
    "authorization_declined": ("the sign-in was declined", "Publish again, and accept it."),
    "access_denied": ("the sign-in was declined", "Publish again, and accept it."),
    "expired_token": ("the code has expired before it was typed", "Publish again."),
    "authorization_pending": ("the code has expired before it was typed", "Publish again."),
}


def _refusal(answer: Mapping[str, Any]) -> AuthenticationError:
    code = str(answer.get("error", "no answer"))
    if code in _REFUSALS:
        message, hint = _REFUSALS[code]
        return AuthenticationError(message, hint=hint)
    described = str(answer.get("error_description", "")).splitlines()
    told = f"Azure AD refuses ({code})" + (f": {described[0][:500]}" if described else "")
    return AuthenticationError(told, hint="Check AZURE_TENANT_ID and AZURE_CLIENT_ID.")


def _verified(directory: Directory, token: str) -> dict[str, Any]:
    """The claims of an ID token, once its signature, audience, issuer and time are right.

    Raises:
        jwt.PyJWTError: they are not.
        requests.RequestException, ValueError: the authority's keys cannot be had.
    """
    import jwt

    configuration = _fetched(f"{directory.authority}/v2.0/.well-known/openid-configuration")
    keys = jwt.PyJWKSet.from_dict(_fetched(str(configuration.get("jwks_uri"))))
    key_id = str(jwt.get_unverified_header(token).get("kid"))
    matching = [key for key in keys.keys if key.key_id == key_id]
    if not matching:
        raise jwt.InvalidKeyError("it is signed with a key that the authority does not publish")
    claims: dict[str, Any] = jwt.decode(
        token,
        matching[0].key,
        algorithms=_ALGORITHMS,
        audience=directory.client_id,
        issuer=str(configuration.get("issuer")),
        leeway=_LEEWAY_S,
        options={"require": ["exp", "iat", "aud", "iss", "oid"]},
    )
    return claims


def _fetched(address: str) -> dict[str, Any]:
    import requests

    if not address.startswith("https://"):
        raise ValueError(f"{address[:200]!r} is no https address")
    answer = requests.get(address, timeout=TIMEOUT_S)
    answer.raise_for_status()
    found: dict[str, Any] = dict(answer.json())  # anything else is a ValueError or TypeError
    return found


def _publisher(directory: Directory, claims: Mapping[str, Any]) -> Publisher:
    tenant = str(claims.get("tid", ""))
    if tenant and tenant != directory.tenant_id:
        raise AuthenticationError(
            f"the publisher is of the directory {tenant}, not of {directory.tenant_id}",
            hint="Sign in with an account of that directory.",
        )
    subject = str(claims["oid"])
    email = str(claims.get("email") or claims.get("preferred_username") or "")
    name = str(claims.get("name") or email or subject)
    if directory.group and directory.group not in _groups(claims):
        raise AuthenticationError(
            f"{name} is not in the group {directory.group} that may publish here",
            hint="Ask its owner to add you; the application must be set to tell groups.",
        )
    if not all(text.isprintable() and len(text) <= 200 for text in (name, email, subject)):
        raise AuthenticationError("the publisher's name is too long or has control characters")
    return Publisher(name, Identity("azure", directory.tenant_id, subject, email))


def _groups(claims: Mapping[str, Any]) -> list[str]:
    groups = claims.get("groups", [])
    return [str(group) for group in groups] if isinstance(groups, list) else []


def _load(cache: "msal.SerializableTokenCache", file: Path) -> None:
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_mode & 0o077:
                raise UsageError(
                    f"{file} may be read by others", hint=f"Run 'chmod 600 {file}', or delete it."
                )
            text = stream.read(CACHE_BYTES_MAX + 1)
        json.loads(text[:CACHE_BYTES_MAX])
        cache.deserialize(text.decode("utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the token cache {file} cannot be used: {error}", hint="Delete it and sign in again."
        ) from error


def _save(cache: "msal.SerializableTokenCache", file: Path) -> None:
    if not cache.has_state_changed:
        return
    staged = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(cache.serialize())
        os.replace(staged, file)
    except OSError as error:
        raise UsageError(f"the token cache {file} cannot be written: {error}") from error

"""A directory on loopback that speaks what Azure AD speaks: discovery, device code, token, JWKS."""

import base64
import datetime as dt
import http.server
import ipaddress
import json
import ssl
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

TENANT = "11111111-2222-3333-4444-555555555555"
CLIENT = "66666666-7777-8888-9999-000000000000"


class AzureDouble:
    """Give `answers` what the token endpoint says, one each poll; "" stands for a good token.

    Attributes:
        claims: put over those of a sound ID token.
        polls: when the token endpoint was asked, monotonic.
        sign_with: another key than the published one, None for that.
    """

    def __init__(self, folder: Path) -> None:
        self.answers: list[str] = []
        self.claims: dict[str, Any] = {}
        self.polls: list[float] = []
        self.interval = 1
        self.published = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.sign_with: rsa.RSAPrivateKey | None = None
        self.refreshes = 0
        self._answered = 0
        double = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, double.get(self.path))

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self._send(*double.post(self.path, form))

            def _send(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.certificate = folder / "authority.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(_certificate(self.certificate))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def authority(self) -> str:
        return f"https://127.0.0.1:{self._server.server_port}/{TENANT}"

    @property
    def issuer(self) -> str:
        return f"{self.authority}/v2.0"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- answers ------------------------------------------------------------------------------

    def get(self, path: str) -> dict[str, Any]:
        if path.endswith("/openid-configuration"):
            return {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.authority}/oauth2/v2.0/authorize",
                "token_endpoint": f"{self.authority}/oauth2/v2.0/token",
                "device_authorization_endpoint": f"{self.authority}/oauth2/v2.0/devicecode",
                "jwks_uri": f"{self.authority}/discovery/v2.0/keys",
            }
        numbers = self.published.public_key().public_numbers()
        key = {"kty": "RSA", "use": "sig", "kid": "k1", "alg": "RS256"}
        return {"keys": [key | {"n": _base64(numbers.n), "e": _base64(numbers.e)}]}

    def post(self, path: str, form: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        if path.endswith("/devicecode"):
            return 200, {
                "device_code": "d",
                "user_code": "ABCD-EFGH",
                "verification_uri": "https://login.example/device",
                "expires_in": 60,
                "interval": self.interval,
                "message": "",
            }
        if form.get("grant_type") == ["refresh_token"]:
            self.refreshes += 1
        else:
            self.polls.append(time.monotonic())
            answer = self.answers[min(self._answered, len(self.answers) - 1)]
            self._answered += 1
            if answer:
                return 400, {"error": answer, "error_description": f"{answer} it is"}
        return 200, {
            "token_type": "Bearer",
            "access_token": "a",
            "refresh_token": "r",
            "expires_in": 3600,
            "scope": "openid profile offline_access User.Read",
            "id_token": self._token(),
            "client_info": _client_info(),
        }

    def _token(self) -> str:
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": CLIENT,
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "tid": TENANT,
            "oid": "oid-of-ann",
            "sub": "sub-of-ann",
            "name": "Ann Example",
            "preferred_username": "ann@example.org",
            "groups": ["publishers"],
        } | self.claims
        return jwt.encode(
            claims, self.sign_with or self.published, algorithm="RS256", headers={"kid": "k1"}
        )


def _client_info() -> str:
    text = json.dumps({"uid": "oid-of-ann", "utid": TENANT})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _base64(number: int) -> str:
    raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _certificate(file: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in one file."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority for tests")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(pem + made.public_bytes(Encoding.PEM))
    return file

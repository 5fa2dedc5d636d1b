"""TLS of the server: a modern context, and what is wrong with a certificate in one sentence."""

from __future__ import annotations

import ssl
from pathlib import Path

from deploykit.errors import UsageError, first_line

# Forward secrecy and authenticated encryption only; TLS 1.3 has nothing else anyway.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class _EncryptedKey(Exception):
    """The key asks for a password, and a server has nobody to ask."""


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """Return the context of a server.

    Args:
        cert: PEM file with the server's certificate and its chain.
        key: PEM file with its key, unencrypted.

    Raises:
        UsageError: one of them cannot be used.
    """
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{flag}: {path}: cannot be read: {error.strerror or error}; name a PEM file"
            ) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, _refuse_password)
    except _EncryptedKey:
        raise UsageError(
            f"--tls-key: {key}: expected a key without password, got an encrypted one; "
            f"decrypt it: openssl pkey -in {key} -out plain.pem"
        ) from None
    except ssl.SSLError as error:
        raise UsageError(f"--tls-cert, --tls-key: {_fault(cert, key, error)}") from error
    return context


def _refuse_password() -> str:
    raise _EncryptedKey


def _fault(cert: str, key: str, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the key of the certificate in {cert}; give the two that belong"
    kinds = {"certificate": cert, "private key": key}
    for kind, path in kinds.items():
        if kind.upper() not in Path(path).read_text(errors="replace").upper():
            return f"{path}: expected a {kind} in PEM, found none; convert or name another file"
    return f"{cert} and {key} cannot be used: {first_line(error)}; make them again"

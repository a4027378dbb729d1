"""TLS at the HTTP port: Serve's Python proxy ends it, HAProxy as Serve runs it cannot."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path


class BadCertificate(ValueError):
    """Certificate and key cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files on every node that has a proxy, under these names."""

    certfile: str
    """PEM, with the chain behind the certificate."""
    keyfile: str
    password: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """Raises `BadCertificate`."""
        for name, path in (("ssl_certfile", self.certfile), ("ssl_keyfile", self.keyfile)):
            if not Path(path).is_file():
                raise BadCertificate(f"http_options.{name} is {path!r}, where there is no file; name a PEM file")
        try:
            # A password is always given: without one OpenSSL would ask for it at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, self.password or "")
        except (ssl.SSLError, OSError) as error:
            raise BadCertificate(
                f"the certificate {self.certfile} and the key {self.keyfile} cannot be used ({error}); give PEM files "
                "that belong together, and the ssl_keyfile_password that the key is encrypted with"
            ) from error

    def http_options(self) -> dict[str, str]:
        """As Serve calls them."""
        options = {"ssl_certfile": self.certfile, "ssl_keyfile": self.keyfile}
        return options if self.password is None else options | {"ssl_keyfile_password": self.password}


def serve_wants_tls() -> bool:
    """Whether the Serve instance that this process belongs to was started with a certificate."""
    from ray.serve.context import _get_global_client

    return bool(_get_global_client().http_config.ssl_certfile)

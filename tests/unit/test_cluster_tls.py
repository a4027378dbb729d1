"""TLS in the configuration: what is wrong with certificates is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from self_signed import make_certificate

from cluster.config_file import BadConfigFile, ServeApplication
from cluster.tls import BadCertificate, Tls


def read(folder: Path, **http_options: object) -> ServeApplication:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"http_options": http_options, "applications": [{}]}))
    return ServeApplication.read(path)


def test_a_certificate_is_read_with_its_key(tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path, password="hush")
    tls = read(tmp_path, ssl_certfile=str(certfile), ssl_keyfile=str(keyfile), ssl_keyfile_password="hush").tls
    assert tls is not None
    tls.check()
    assert tls.http_options() == {
        "ssl_certfile": str(certfile),
        "ssl_keyfile": str(keyfile),
        "ssl_keyfile_password": "hush",
    }
    assert "hush" not in repr(tls)
    assert read(tmp_path).tls is None


def test_half_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfigFile, match="both ssl_certfile and ssl_keyfile"):
        read(tmp_path, ssl_certfile="/somewhere")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    certfile, keyfile = map(str, make_certificate(tmp_path / "one", password="hush"))
    _, other = map(str, make_certificate(tmp_path / "two"))
    for tls, complaint in (
        (Tls(certfile=certfile, keyfile="/nowhere.pem", password=None), r"ssl_keyfile is '/nowhere\.pem'"),
        (Tls(certfile=certfile, keyfile=other, password=None), "cannot be used"),
        (Tls(certfile=certfile, keyfile=keyfile, password=None), "ssl_keyfile_password"),
        (Tls(certfile=certfile, keyfile=keyfile, password="hash"), "ssl_keyfile_password"),
    ):
        with pytest.raises(BadCertificate, match=complaint):
            tls.check()

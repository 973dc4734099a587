"""Certificates of the session's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from servers import install


def make(home: Path) -> Path:
    """``server.key`` and ``server.crt``, the authority's ``ca.crt``, and ``stranger.crt`` of one that signed nothing."""
    if shutil.which("openssl") is None:
        install("openssl", None, "openssl")
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "stranger"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.crt")
        subprocess.run([*new, *files, "-subj", f"/CN={name}"], cwd=home, check=True, capture_output=True)
    files = ("-keyout", "server.key", "-out", "server.crt", "-CA", "ca.crt", "-CAkey", "ca.key")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    names += ("-addext", "basicConstraints=critical,CA:FALSE")
    subprocess.run([*new, *files, *names], cwd=home, check=True, capture_output=True)
    return home

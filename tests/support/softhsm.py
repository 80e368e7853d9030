"""A hardware token in software: SoftHSM with one key in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LIBRARIES = (Path("/usr/lib/softhsm/libsofthsm2.so"), Path("/usr/lib64/pkcs11/libsofthsm2.so"))
SOFTHSM = next((path for path in LIBRARIES if path.exists()), None)


def make_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A PKCS #11 token with an ECDSA P-256 key of id 2: its URI; skips where SoftHSM is missing."""
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if SOFTHSM is None:
        pytest.skip("SoftHSM is not installed")
    (folder / "tokens").mkdir()
    config = folder / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(config))
    monkeypatch.setenv("PYKCS11LIB", str(SOFTHSM))
    monkeypatch.setenv("RLHF_AUDIT_SIGNER_PIN", "123456")
    tool = ["softhsm2-util", "--init-token", "--free", "--label", "audit", "--pin", "123456", "--so-pin", "654321"]
    subprocess.run(tool, check=True, capture_output=True)
    from pkcs11.util.ec import encode_named_curve_parameters

    library = pkcs11.lib(str(SOFTHSM))
    library.reinitialize()
    with library.get_token(token_label="audit").open(user_pin="123456", rw=True) as session:
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
        )
        parameters.generate_keypair(store=True, id=b"\x02", label="log")
    return "hsm:2?label=audit"

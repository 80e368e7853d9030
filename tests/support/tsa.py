"""A timestamping authority of the tests' own: an openssl CA, a certificate, and `openssl ts -reply` behind HTTP."""

from __future__ import annotations

import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

CONFIG = """
[ tsa ]
default_tsa = one
[ one ]
serial = {folder}/serial
crypto_device = builtin
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = secs:1
ess_cert_id_alg = sha256
[ ca ]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
[ stamping ]
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,timeStamping
[ serving ]
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,serverAuth
"""
CA_NAME = ("-subj", "/CN=Local test CA")
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*words: str | Path, **options):
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, check=True, **options)


@dataclass(frozen=True)
class Authority:
    """A CA in a folder and the authorities that it vouches for."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir(parents=True)
        (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder))
        (folder / "serial").write_text("01\n")
        made = cls(folder)
        request = ("req", "-x509", *KEY, "-days", "30", *CA_NAME, "-config", folder / "tsa.cnf")
        openssl(*request, "-extensions", "ca", "-keyout", folder / "ca.key", "-out", made.ca)
        return made

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def pem(self) -> bytes:
        return self.ca.read_bytes()

    def certify(self, name: str = "tsa", extensions: str = "stamping", **dates: str) -> None:
        """A certificate ``name``; openssl's ca is what can date one in the past."""
        folder, config = self.folder, self.folder / "tsa.cnf"
        asked = ("req", *KEY, "-subj", f"/CN=Local test {name}", "-config", config, "-keyout", folder / f"{name}.key")
        openssl(*asked, "-out", folder / f"{name}.csr")
        if not dates:
            signed = ("x509", "-req", "-in", folder / f"{name}.csr", "-CA", self.ca, "-CAkey", folder / "ca.key")
            made = ("-CAcreateserial", "-days", "20", "-extfile", config, "-extensions", extensions)
            openssl(*signed, *made, "-out", folder / f"{name}.pem")
            return
        self._sign(name, extensions, "-cert", str(self.ca), **dates)

    def expire(self, **dates: str) -> None:
        """The CA's own certificate anew, of other dates and the same key."""
        openssl(
            "req",
            "-new",
            "-key",
            self.folder / "ca.key",
            "-config",
            self.folder / "tsa.cnf",
            *CA_NAME,
            "-out",
            self.folder / "ca.csr",
        )
        self._sign("ca", "ca", "-selfsign", **dates)

    def _sign(self, name: str, extensions: str, *how: str, start: str, end: str) -> None:
        folder = self.folder
        (folder / "index.txt").write_text("")
        ca = folder / "ca.cnf"
        ca.write_text(
            f"[ca]\ndefault_ca=one\n[one]\ndatabase={folder}/index.txt\nnew_certs_dir={folder}\nrand_serial=yes\n"
            "policy=any\n[any]\ncommonName=supplied\n"
        )
        words = ("ca", "-batch", "-config", ca, "-md", "sha256", *how, "-keyfile", folder / "ca.key")
        span = ("-startdate", start, "-enddate", end, "-extfile", folder / "tsa.cnf", "-extensions", extensions)
        openssl(*words, *span, "-in", folder / f"{name}.csr", "-out", folder / f"{name}.pem", "-notext")

    def answer(self, query: bytes, name: str = "tsa") -> bytes:
        """`openssl ts -reply` to a TimeStampReq."""
        asked, replied = self.folder / f"{threading.get_ident()}.tsq", self.folder / f"{threading.get_ident()}.tsr"
        asked.write_bytes(query)
        signer = ("-signer", self.folder / f"{name}.pem", "-inkey", self.folder / f"{name}.key")
        openssl("ts", "-reply", "-config", self.folder / "tsa.cnf", *signer, "-queryfile", asked, "-out", replied)
        return replied.read_bytes()

    def stamp(self, message: bytes, name: str = "tsa") -> bytes:
        """A timestamp of a message."""
        request = TimestampRequestBuilder().data(message).hash_algorithm(HashAlgorithm.SHA256).build()
        return self.answer(request.as_bytes(), name)


@dataclass
class Served:
    """A running service: its address, and what it was asked."""

    url: str
    asked: list[bytes] = field(default_factory=list)


@contextmanager
def serve(answer, kind="application/timestamp-reply"):
    """HTTP on the loopback: ``answer(body)`` gives the body, or ``(status, headers, body)``."""
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            served.asked.append(body)
            said = answer(body)
            status, headers, data = said if isinstance(said, tuple) else (200, {}, said)
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # whoever asked has had enough
                self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/tsa"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

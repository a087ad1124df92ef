"""An ssl.SSLContext that always presents the current X.509-SVID and trusts the current bundle.

For every client library that takes an ssl.SSLContext (openai, chromadb, httpx, aiohttp, ...), sync and async:

    context = sallyport_svid.from_environment()
    client = openai.OpenAI(..., http_client=openai.DefaultHttpxClient(verify=context))

The identity comes from the SPIFFE Workload API, so that the process itself is attested and no key is ever on a disk,
or from a directory that `sallyport svid watch --write DIR` keeps fresh. The server must have a certificate for its
host name from the workload's own trust domain; federated ones are not trusted. It never logs or writes a key.

A rotated SVID is used for new connections; an open one keeps the certificate that it was opened with, and the gateway
ends it before that certificate expires.
"""
import os
import ssl
import threading
from pathlib import Path


class Material:
    """A certificate chain with its private key, and the authorities to trust: all PEM bytes, all of one moment."""

    def __init__(self, chain, key, bundle):
        self.chain, self.key, self.bundle = chain, key, bundle

    def __eq__(self, other):
        return isinstance(other, Material) and vars(self) == vars(other)

    def load(self, context):
        """Loads it into an ssl.SSLContext; raises ssl.SSLError where key and certificate do not belong together."""
        context.load_verify_locations(cadata=self.bundle.decode())
        memory = os.memfd_create("svid")  # the ssl module reads keys from paths only
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(self.chain + self.key)
            context.load_cert_chain(f"/proc/self/fd/{memory}")
        finally:
            os.close(memory)


class Directory:
    """Material from svid.pem, svid_key.pem and bundle.pem in a directory, read anew each time."""

    def __init__(self, directory):
        self._directory = Path(directory)

    def material(self):
        return Material(*((self._directory / name).read_bytes() for name in ("svid.pem", "svid_key.pem", "bundle.pem")))


class WorkloadAPI:
    """Material from the SPIFFE Workload API at $SPIFFE_ENDPOINT_SOCKET, which pushes each new SVID as it is issued."""

    def __init__(self, timeout=10):
        from spiffe import X509Source  # only who uses the Workload API needs the package

        try:
            self._source = X509Source(timeout_in_seconds=timeout)
        except Exception as cause:
            raise RuntimeError(
                f"get an identity from {os.environ.get('SPIFFE_ENDPOINT_SOCKET')}: {cause}\n"
                "hint: is the control plane running, and is there a Workload whose selectors match this process?") from cause

    def material(self):
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        def pem(certificates):
            return b"".join(c.public_bytes(Encoding.PEM) for c in certificates)

        context = self._source.get_x509_context()
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        key = svid.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Material(pem(svid.cert_chain), key, b"".join(sorted(pem([c]) for c in bundle.x509_authorities)))


class SvidContext(ssl.SSLContext):
    """Wraps each new connection with the material that its source has at that moment.

    Every change gets a new inner context, so key and certificate never mix, and an authority that has left the bundle
    is no longer trusted. Material that does not fit together (files half replaced) leaves the last good one in place.
    Safe for use by several threads.
    """

    def __new__(cls, source):
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, source):
        self._source = source
        self._lock = threading.Lock()
        self._material = self._inner = self._protocols = None
        self.rotations = -1  # how often the material has changed since the start
        self._current()  # no identity: fail now, not at the first request

    def _current(self):
        with self._lock:
            try:
                material = self._source.material()
                if material != self._material:
                    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    inner.minimum_version = ssl.TLSVersion.TLSv1_3
                    material.load(inner)
                    if self._protocols:
                        inner.set_alpn_protocols(self._protocols)
                    self._material, self._inner = material, inner
                    self.rotations += 1
            except (OSError, ssl.SSLError):
                if self._inner is None:
                    raise
            return self._inner

    def set_alpn_protocols(self, protocols):
        with self._lock:
            self._protocols = list(protocols)
            self._inner.set_alpn_protocols(self._protocols)

    def wrap_socket(self, *args, **kwargs):
        return self._current().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args, **kwargs):
        return self._current().wrap_bio(*args, **kwargs)


def from_environment():
    """The identity of this process: from $SVID_DIR where that is set, else from $SPIFFE_ENDPOINT_SOCKET."""
    directory = os.environ.get("SVID_DIR")
    return SvidContext(Directory(directory) if directory else WorkloadAPI())

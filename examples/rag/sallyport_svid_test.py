"""Tests of sallyport_svid against a real TLS server and a real Workload API over a Unix socket.

    .parts/venv/bin/python -m unittest discover -s examples/rag -p '*_test.py'
"""
import asyncio
import concurrent.futures
import datetime
import os
import queue
import socket
import ssl
import tempfile
import threading
import unittest
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from spiffe._proto import workload_pb2, workload_pb2_grpc

from sallyport_svid import Directory, SvidContext, WorkloadAPI

HOST = "chat.models.internal"


class Authority:
    """A certificate authority of trust domain example.org."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        self.certificate = self._sign(self.key, "", [], authority=True)

    def issue(self, path, names=()):
        """Returns a new certificate for spiffe://example.org/PATH and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(key, path, names, authority=False), key

    def _sign(self, key, path, names, authority):
        now = datetime.datetime.now(datetime.timezone.utc)
        sans = [x509.UniformResourceIdentifier(f"spiffe://example.org{path}"), *map(x509.DNSName, names)]
        subject = self.name if authority else x509.Name([])
        return (x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(minutes=1)).not_valid_after(now + datetime.timedelta(hours=1))
                .add_extension(x509.SubjectAlternativeName(sans), critical=not authority)
                .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
                .add_extension(x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False),
                               critical=True)
                .sign(self.key, hashes.SHA256()))


def pem(certificate):
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write(directory, certificate, key, bundle):
    (directory / "svid.pem").write_bytes(pem(certificate))
    (directory / "svid_key.pem").write_bytes(key_pem(key))
    (directory / "bundle.pem").write_bytes(pem(bundle))


class Server:
    """A TLS server that demands a client certificate and answers each connection with that certificate's serial."""

    def __init__(self, directory, authority, host=HOST):
        write(directory, *authority.issue("/gateway", [host]), authority.certificate)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
        self._context.load_verify_locations(directory / "bundle.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(connection, server_side=True) as tls:
                    tls.sendall(tls.getpeercert()["serialNumber"].encode())
            except (OSError, ssl.SSLError):
                connection.close()

    def close(self):
        self._listener.close()


class WorkloadServer(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """A Workload API that pushes what the test gives it."""

    def __init__(self, path):
        self._updates = queue.Queue()
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix://{path}")
        self._server.start()

    def push(self, certificate, key, bundle):
        self._updates.put(workload_pb2.X509SVIDResponse(svids=[workload_pb2.X509SVID(
            spiffe_id="spiffe://example.org/rag-app", x509_svid=certificate.public_bytes(Encoding.DER),
            x509_svid_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            bundle=bundle.public_bytes(Encoding.DER))]))

    def FetchX509SVID(self, request, context):
        while (update := self._updates.get()) is not None:
            yield update

    def close(self):
        self._updates.put(None)
        self._server.stop(None).wait()


def seen(context, server, host=HOST):
    """Connects as a client library does; returns the serial of the certificate that the server saw."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname=host) as tls:
            return int(tls.recv(100), 16)


class SvidContextTest(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.svid = Path(scratch.name, "svid")
        self.server_files = Path(scratch.name, "server")
        self.socket = Path(scratch.name, "api.sock")
        self.svid.mkdir()
        self.server_files.mkdir()
        self.authority = Authority()
        self.server = self.start(self.authority)

    def start(self, authority, host=HOST):
        server = Server(self.server_files, authority, host)
        self.addCleanup(server.close)
        return server

    def issue(self):
        """Writes a new SVID as `svid watch --write` does; returns its serial."""
        certificate, key = self.authority.issue("/rag-app")
        write(self.svid, certificate, key, self.authority.certificate)
        return certificate.serial_number

    def test_new_connection_presents_rotated_svid(self):
        first = self.issue()
        context = SvidContext(Directory(self.svid))
        self.assertEqual(seen(context, self.server), first)
        self.assertEqual(context.rotations, 0)
        second = self.issue()
        self.assertEqual(seen(context, self.server), second)
        self.assertEqual(context.rotations, 1)

    def test_half_replaced_files_leave_the_last_good_svid(self):
        first = self.issue()
        context = SvidContext(Directory(self.svid))
        certificate, key = self.authority.issue("/rag-app")
        (self.svid / "svid_key.pem").write_bytes(key_pem(key))
        self.assertEqual(seen(context, self.server), first)
        (self.svid / "svid.pem").unlink()
        self.assertEqual(seen(context, self.server), first)
        (self.svid / "svid.pem").write_bytes(pem(certificate))
        self.assertEqual(seen(context, self.server), certificate.serial_number)

    def test_no_svid_at_start_is_an_error(self):
        with self.assertRaises(OSError):
            SvidContext(Directory(self.svid))

    def test_authority_that_left_the_bundle_is_not_trusted(self):
        self.issue()
        context = SvidContext(Directory(self.svid))
        seen(context, self.server)
        (self.svid / "bundle.pem").write_bytes(pem(Authority().certificate))
        with self.assertRaises(ssl.SSLCertVerificationError):
            seen(context, self.server)

    def test_server_of_another_name_or_authority_is_refused(self):
        self.issue()
        context = SvidContext(Directory(self.svid))
        with self.assertRaises(ssl.SSLCertVerificationError):
            seen(context, self.start(self.authority, host="docs.vectors.internal"))
        with self.assertRaises(ssl.SSLCertVerificationError):
            seen(context, self.start(Authority()))

    def test_async_clients(self):
        serial = self.issue()
        context = SvidContext(Directory(self.svid))

        async def connect():
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, ssl=context, server_hostname=HOST)
            answer = await reader.read(100)
            writer.close()
            return int(answer, 16)

        self.assertEqual(asyncio.run(connect()), serial)

    def test_workload_api_pushes_rotated_svid(self):
        os.environ["SPIFFE_ENDPOINT_SOCKET"] = f"unix://{self.socket}"
        self.addCleanup(os.environ.pop, "SPIFFE_ENDPOINT_SOCKET")
        api = WorkloadServer(self.socket)
        self.addCleanup(api.close)
        first, second = self.authority.issue("/rag-app"), self.authority.issue("/rag-app")
        api.push(*first, self.authority.certificate)
        source = WorkloadAPI()
        self.addCleanup(source._source.close)
        context = SvidContext(source)
        self.assertEqual(seen(context, self.server), first[0].serial_number)

        updated = threading.Event()
        source._source.subscribe_for_updates(updated.set)
        api.push(*second, self.authority.certificate)
        self.assertTrue(updated.wait(10))
        self.assertEqual(seen(context, self.server), second[0].serial_number)

    def test_workload_api_that_is_absent_names_its_socket(self):
        os.environ["SPIFFE_ENDPOINT_SOCKET"] = f"unix://{self.socket}"
        self.addCleanup(os.environ.pop, "SPIFFE_ENDPOINT_SOCKET")
        with self.assertRaisesRegex(RuntimeError, f"{self.socket}.*\nhint"):
            WorkloadAPI(timeout=0.2)


if __name__ == "__main__":
    unittest.main()

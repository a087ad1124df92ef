"""The official OpenAI and Chroma clients, pointed at the gateway: with this process's identity, and traced.

What differs from using a model server and a vector store directly is the base URL and `verify=`. Environment:

    SALLYPORT_CHAT, SALLYPORT_DOCS   the endpoints, https://HOST:PORT
    SALLYPORT_RESOLVE                HOST=ADDRESS,... for hosts that no DNS knows, like curl's --resolve; optional
    SPIFFE_ENDPOINT_SOCKET           where the identity comes from; or SVID_DIR, see sallyport_svid.py
    OTEL_EXPORTER_OTLP_ENDPOINT      where this application's own spans go, by OTLP over gRPC; optional
"""
import os
import socket
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import sallyport_svid


class Gateway:
    """The way to both endpoints for one application. Make one per process: tracing and names are process-wide."""

    def __init__(self, application):
        self.application = application
        try:
            self.chat_url, self.docs_url = os.environ["SALLYPORT_CHAT"], os.environ["SALLYPORT_DOCS"]
        except KeyError as name:
            raise SystemExit(f"{application}: error: {name} is not set\nhint: see gateway.py") from None
        self.last = None  # method, path and status of the last request, as seen on the wire
        _resolve(os.environ.get("SALLYPORT_RESOLVE", ""))
        self.tracer = self._trace()
        plain = self.chat_url.startswith("http:")  # directly to the servers, for trying the application alone
        try:
            self.identity = None if plain else sallyport_svid.from_environment()
        except (RuntimeError, OSError) as cause:
            raise SystemExit(f"{application}: error: {cause}") from None

    def chat(self):
        """An OpenAI client. It does not retry: each call is one request, and what it got is what the caller sees."""
        import openai  # each client takes a second to import: an application pays for what it uses

        return openai.OpenAI(
            base_url=self.chat_url + "/v1", api_key="unused", max_retries=0, timeout=60,
            http_client=openai.DefaultHttpxClient(verify=self.identity or True))

    def docs(self):
        """A Chroma client. It makes three requests at once: its own identity, the tenant and the database."""
        import chromadb

        settings = chromadb.Settings(anonymized_telemetry=False)
        settings.chroma_server_ssl_verify = self.identity  # its constructor takes a path only
        url = urlsplit(self.docs_url)
        return chromadb.HttpClient(host=url.hostname, port=url.port, ssl=url.scheme == "https", settings=settings)

    def http(self):
        """A bare HTTP client to the vector store, for requests that its official client would never make."""
        import httpx

        return httpx.Client(base_url=self.docs_url, verify=self.identity or True, timeout=60)

    def _trace(self):
        """Starts tracing: a client span for each request, and a traceparent header, which the gateway's spans join."""
        provider = TracerProvider(resource=Resource.create({"service.name": self.application}))
        if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
        for library in HTTPXClientInstrumentor(), HTTPX2ClientInstrumentor():  # Chroma's and OpenAI's HTTP client
            library.instrument(request_hook=self._sent, response_hook=self._received)
        return trace.get_tracer(self.application)

    def _sent(self, span, request):
        method = request.method.decode() if isinstance(request.method, bytes) else request.method
        self.last = {"request": f"{method} {request.url.raw_path.decode()}", "status": None}

    def _received(self, span, request, response):
        self.last["status"] = response.status_code


def _resolve(table):
    """Makes the host names in the table mean the addresses in it, for all that this process connects to."""
    addresses = dict(entry.split("=") for entry in table.split(",") if entry)
    stock = socket.getaddrinfo
    if addresses:
        socket.getaddrinfo = lambda host, *args, **kwargs: stock(addresses.get(host, host), *args, **kwargs)

"""One attempt to do something through the gateway, and one line of JSON on standard output that says what came of it:

    {"ts": 1770000000.123456, "caller": "rag-app", "endpoint": "docs", "operation": "Write", "resource": "handbook",
     "what": "upsert a record", "expect": "deny", "ok": true, "request": "POST /api/v2/...", "got_status": 403,
     "exception": "ChromaAuthError", "error_body": "...", "ms": 4.2, "tokens": null, "trace_id": "4bf9..."}

got_status and request are of the last request that the attempt made, as seen on the wire; the status is null where no
answer came at all, as when TLS fails. tokens are those that the model server counted, prompt and answer together.
An attempt is ok when what was expected is what was seen: "allow" is a 2xx, "deny" is a 403 and nothing else.
"""
import json
import time

from opentelemetry import trace


class Attempts:
    """Makes attempts and counts those that did not go as expected."""

    def __init__(self, gateway):
        self._gateway = gateway
        self.surprises = 0

    def __call__(self, endpoint, operation, resource, expect, what, action, **more):
        """Calls action(), which may return the number of tokens it used. Reports and swallows what it raises; more goes
        into the line. Returns whether it was as expected."""
        gateway, tokens, error = self._gateway, None, None
        gateway.last = None
        with gateway.tracer.start_as_current_span(f"{operation or 'GET'} {resource}") as span:
            started, clock = time.time(), time.perf_counter()
            try:
                result = action()
                tokens = result if isinstance(result, int) else None
            except Exception as raised:  # the libraries share no base class, and any error is a result here
                error = raised
            ms = (time.perf_counter() - clock) * 1000
        wire = gateway.last or {"request": None, "status": None}
        status = wire["status"]
        # The clients raise whatever is not a 2xx; without a status nothing was asked or nothing was answered.
        ok = (error is None and status is not None) if expect == "allow" else status == 403 and error is not None
        self.surprises += not ok
        emit(
            ts=started, caller=gateway.application, endpoint=endpoint, operation=operation, resource=resource, what=what,
            expect=expect, ok=ok, request=wire["request"], got_status=status,
            exception=error and type(error).__name__, error_body=error and body(error),
            ms=round(ms, 2), tokens=tokens, trace_id=trace.format_trace_id(span.get_span_context().trace_id), **more)
        return ok


def body(error):
    """What the error says: the response's body where the library keeps it, else the message."""
    response = getattr(error, "response", None)
    if response is None:
        return str(error.__cause__ or error)
    try:
        return response.json()
    except ValueError:
        return response.text


def emit(**line):
    """Prints one line of JSON."""
    print(json.dumps(line), flush=True)

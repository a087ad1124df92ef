"""Tests that attempts report what really happened, with the official clients on a real HTTP server: a refusal in each
API's own shape is a useful exception, and nothing that is not a 403 passes for one.
"""
import contextlib
import http.server
import io
import json
import os
import threading
import unittest

from attempts import Attempts
from gateway import Gateway

WHY = "rag-app may not Infer smollm2-private at chat: no grant allows it"
OPENAI = {"error": {"message": WHY, "type": "permission_denied", "code": "no_grant", "request_id": "r1"}}
CHROMA = {"error": "AuthError", "message": WHY, "request_id": "r1"}


class Answers(http.server.BaseHTTPRequestHandler):
    """Gives each request the answer that its server holds."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, content = self.server.answer
        self.server.traceparent = self.headers.get("traceparent")
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


class AttemptsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=cls.server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{cls.server.server_port}"
        os.environ.update(SALLYPORT_CHAT=url, SALLYPORT_DOCS=url)
        cls.gateway = Gateway("rag-app")
        cls.chat = cls.gateway.chat()

    @classmethod
    def tearDownClass(cls):
        cls.chat.close()
        cls.server.shutdown()
        cls.server.server_close()

    def attempt(self, status, answer, expect, action):
        self.server.answer = status, json.dumps(answer).encode()
        attempts, out = Attempts(self.gateway), io.StringIO()
        with contextlib.redirect_stdout(out):
            ok = attempts("chat", "Infer", "smollm2", expect, "try", action)
        line = json.loads(out.getvalue())
        self.assertEqual(line["ok"], ok)
        self.assertEqual(attempts.surprises, not ok)
        return line

    def ask(self):
        return self.chat.chat.completions.create(model="m", messages=[]).usage.total_tokens

    def test_refusal_by_openai_endpoint(self):
        line = self.attempt(403, OPENAI, "deny", self.ask)
        self.assertTrue(line["ok"])
        self.assertEqual((line["got_status"], line["exception"]), (403, "PermissionDeniedError"))
        self.assertEqual(line["error_body"], OPENAI)
        self.assertEqual(line["request"], "POST /v1/chat/completions")

    def test_refusal_by_chroma_endpoint(self):
        line = self.attempt(403, CHROMA, "deny", self.gateway.docs)
        self.assertTrue(line["ok"])
        self.assertEqual((line["got_status"], line["exception"]), (403, "ChromaAuthError"))
        self.assertEqual(line["error_body"], WHY)

    def test_answer_and_its_trace(self):
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [],
                  "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
        line = self.attempt(200, answer, "allow", self.ask)
        self.assertTrue(line["ok"])
        self.assertEqual(line["tokens"], 7)
        self.assertEqual(self.server.traceparent.split("-")[1], line["trace_id"])
        self.assertFalse(self.attempt(200, answer, "deny", self.ask)["ok"])

    def test_only_a_403_is_a_refusal(self):
        for status in 400, 404, 500:
            self.assertFalse(self.attempt(status, OPENAI, "deny", self.ask)["ok"], status)
        self.assertFalse(self.attempt(403, OPENAI, "allow", self.ask)["ok"])

    def test_no_answer_is_not_a_refusal(self):
        def unreachable():
            self.chat.with_options(base_url="http://127.0.0.1:1").models.list()

        line = self.attempt(200, {}, "deny", unreachable)
        self.assertFalse(line["ok"])
        self.assertIsNone(line["got_status"])
        self.assertIn("refused", line["error_body"])


if __name__ == "__main__":
    unittest.main()

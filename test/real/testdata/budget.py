"""Asks as an application does, with an SVID, and prints what came of it: budget.py HOST ADDRESS FOLDER MODEL MAX"""

import socket
import ssl
import sys

import httpx
import openai

host, address, folder, model, most = sys.argv[1:]
port = address.rpartition(":")[2]
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda name, *more, **named: resolve("127.0.0.1" if name == host else name, *more, **named)
context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
context.load_cert_chain(f"{folder}/svid.pem", f"{folder}/key.pem")
# The client tries again when it thinks fit.
client = openai.OpenAI(base_url=f"https://{host}:{port}/v1", api_key="none", http_client=httpx.Client(verify=context))
try:
    client.chat.completions.create(model=model, max_tokens=int(most), messages=[{"role": "user", "content": "hello"}])
    print("answered")
except openai.RateLimitError as e:
    print(type(e).__name__, e.status_code, e.code, e.type, e.response.headers["x-ratelimit-remaining-requests"], e.response.headers["retry-after"] != "")

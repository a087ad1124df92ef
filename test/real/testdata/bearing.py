"""Asks a model with the token in $OPENAI_API_KEY and prints what came of it: bearing.py HOST ADDRESS MODEL"""

import socket
import sys

import openai

host, address, model = sys.argv[1:]
port = address.rpartition(":")[2]
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda name, *more, **named: resolve("127.0.0.1" if name == host else name, *more, **named)
try:
    client = openai.OpenAI(base_url=f"https://{host}:{port}/v1", max_retries=0)
    answer = client.chat.completions.with_raw_response.create(model=model, messages=[{"role": "user", "content": "hello"}])
    print(answer.status_code)
except openai.APIStatusError as e:
    print(type(e).__name__, e.status_code, e.code)

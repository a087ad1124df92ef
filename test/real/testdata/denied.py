"""Sends one request with httpx and prints status and body: denied.py 1|2 PATH HOST PORT FOLDER BODY EXPECT"""

import ssl
import sys

import httpx

version, path, host, port, folder, size, expect = sys.argv[1:]
context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
context.load_cert_chain(f"{folder}/svid.pem", f"{folder}/key.pem")
headers = {"host": host}
if expect:
    headers["expect"] = "100-continue"
with httpx.Client(verify=context, http1=version == "1", http2=version == "2") as client:
    answer = client.post(f"https://127.0.0.1:{port}{path}", json={"model": "m", "a": "x" * int(size)}, headers=headers,
                         extensions={"sni_hostname": host})
    print(answer.status_code, answer.text, end="")

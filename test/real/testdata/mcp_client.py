"""Asks a server of MCP for all that it has, and prints what came of it: mcp_client.py HOST ADDRESS FOLDER"""

import asyncio
import socket
import ssl
import sys

import httpx2
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

host, address, folder = sys.argv[1:]
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda name, *more, **named: resolve("127.0.0.1" if name in (host, host.encode()) else name, *more, **named)
context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
context.load_cert_chain(f"{folder}/svid.pem", f"{folder}/key.pem")
progress = []


async def note(done, total, message):
    progress.append(done)


async def said(what, question):
    try:
        print(what + ":", await question)
    except MCPError as e:
        print(what + ":", e.error.code, e.error.message)


async def text(question):
    return (await question).content[0].text


async def main():
    async with httpx2.AsyncClient(verify=context) as http:
        transport = streamable_http_client(f"https://{host}:{address.rpartition(':')[2]}/mcp", http_client=http)
        async with Client(transport) as client:
            print("version:", client.protocol_version)
            print("tools:", *[t.name for t in (await client.list_tools()).tools])
            print("prompts:", *[p.name for p in (await client.list_prompts()).prompts])
            print("resources:", *[r.uri for r in (await client.list_resources()).resources])
            print("templates:", *[t.uri_template for t in (await client.list_resource_templates()).resource_templates])
            await said("get_ticket", text(client.call_tool("get_ticket", {"id": 3})))
            await said("grüße", text(client.call_tool("grüße", {})))
            await said("slow", text(client.call_tool("slow", {}, progress_callback=note)))
            print("progress:", *progress)
            await said("drop_all", text(client.call_tool("drop_all", {})))
            await said("summary", text_of_prompt(client.get_prompt("summary", {"topic": "x"})))
            await said("secret", text_of_prompt(client.get_prompt("secret", {})))
            for uri in "file:///docs/a.md", "file:///docs/b.txt", "file:///etc/passwd", "file:///docs/../etc/passwd":
                await said(uri, text_of_resource(client.read_resource(uri)))


async def text_of_prompt(question):
    return (await question).messages[0].content.text


async def text_of_resource(question):
    return (await question).contents[0].text


asyncio.run(main())

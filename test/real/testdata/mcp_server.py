"""A server of MCP: mcp_server.py HOST PORT"""

import sys

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.transport_security import TransportSecuritySettings

host, port = sys.argv[1:]
server = MCPServer("tickets")


@server.tool()
def get_ticket(id: int) -> str:
    return f"ticket {id}"


@server.tool()
def drop_all() -> str:
    return "dropped"


@server.tool(name="grüße")
def greet() -> str:
    return "hallo"


@server.tool()
async def slow(context: Context) -> str:
    await context.report_progress(1, 2)
    return "done"


@server.resource("file:///docs/a.md")
def a() -> str:
    return "a"


@server.resource("file:///etc/passwd")
def passwd() -> str:
    return "root"


@server.resource("file:///docs/{name}.txt")
def text(name: str) -> str:
    return name


@server.prompt()
def summary(topic: str) -> str:
    return "sum up " + topic


@server.prompt()
def secret() -> str:
    return "secret"


# The gateway passes on the host that its callers ask for, and its catalogue asks for the address.
server.run(transport="streamable-http", host="127.0.0.1", port=int(port),
           transport_security=TransportSecuritySettings(allowed_hosts=[host, f"127.0.0.1:{port}"]))

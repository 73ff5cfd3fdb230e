"""An MCP server with one tool, for LiteLLM's interpreter: its arguments are its port and folder."""

import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer

_, port, folder = sys.argv
server = MCPServer("files")


@server.tool()
def read_file(name: str) -> str:
    """Read a file of the working directory."""
    with (Path(folder) / "calls").open("a") as calls:
        calls.write(f"{name}\n")
    return (Path(folder) / name).read_text()


server.run("streamable-http", port=int(port), stateless_http=True)

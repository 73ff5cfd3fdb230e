"""One file per endpoint; ``sidelight.server.app`` lists their routers."""

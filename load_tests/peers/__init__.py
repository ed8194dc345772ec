"""The other servers: one directory each, with the server, its requirements and an environment of its own."""

"""How messages travel: frames, the protocol's state machine, links, the client and the server. Never imports torch."""

"""How bytes move: the transport interface, URI schemes and their registry, sockets, spinning, and how good a link is."""

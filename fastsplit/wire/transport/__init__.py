"""How bytes move: the transport interface, URI schemes and their registry, sockets, spinning, the speed of a link."""

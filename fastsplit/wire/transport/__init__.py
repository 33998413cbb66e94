"""How bytes move between two processes: addresses, sockets, spinning, and how good a link is."""

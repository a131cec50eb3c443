"""The NBD protocol: framing, handshake, transmission, listeners."""

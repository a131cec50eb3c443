"""The status socket: attributes in, sysfs-style text or JSON out; and its client."""

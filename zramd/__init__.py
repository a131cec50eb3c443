"""zramd: a userspace zram. A compressed block device in memory, served over NBD."""

__version__ = "0.1.0"

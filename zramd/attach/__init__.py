"""The kernel's side of an export: making it a block device that can be formatted, mounted or swapped to.

`kernel` uses the kernel's own NBD client, `loop` gets by without one.
"""

"""What the kernel leaves to scripts: which pages of a disk to recompress or to write back, and when."""

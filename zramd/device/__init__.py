"""The zram device: page table, same-filled and huge pages, limits, counters, codecs."""

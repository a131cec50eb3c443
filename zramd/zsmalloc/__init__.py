"""The zsmalloc allocator on flat shared regions. It knows nothing of blocks, codecs or NBD."""

from zramd.zsmalloc.classes import FitRule, Geometry, SizeClass, geometry
from zramd.zsmalloc.compaction import compact
from zramd.zsmalloc.pool import Pool
from zramd.zsmalloc.recovery import MAX_LOST, DamagedError, recover

__all__ = ["MAX_LOST", "DamagedError", "FitRule", "Geometry", "Pool", "SizeClass", "compact", "geometry", "recover"]

"""A store on a file or block device for objects that only this process can read. It knows nothing of pages."""

from zramd.backing.medium import Medium, NotBlockError
from zramd.backing.objects import DamagedObjectError
from zramd.backing.store import FullError, Kept, Store

__all__ = ["DamagedObjectError", "FullError", "Kept", "Medium", "NotBlockError", "Store"]

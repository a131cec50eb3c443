"""The configuration: TOML in, settings out, and errors that name the file, the line, the key and what to do.

    [server]   where to listen         [access]  who may connect       [zram0], [zram1]...  the disks, in this order
    [tls]      certificates            [limits]  what clients may take

Keys of a disk are those of zram-generator where it has them. `files` finds the files, `document` reads and merges them,
`keys` knows what may stand in them, `values` what a value may be, and `show` writes all that is in effect.
"""

from zramd.config.document import ConfigError
from zramd.config.files import find
from zramd.config.keys import Configuration, load, load_disk
from zramd.config.values import find_group, find_user, parse_address

__all__ = ["ConfigError", "Configuration", "find", "find_group", "find_user", "load", "load_disk", "parse_address"]

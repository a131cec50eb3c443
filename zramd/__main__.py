"""The `zramd` command, which is also `python -m zramd`.

Until a verb runs, and after it, there is nothing that Ctrl-C would have to undo: it ends the process at once, where
Python's way is a traceback of whatever was being imported.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from zramd.cli import main

if __name__ == "__main__":
    main()

"""`python -m zramd` is the `zramd` command."""

from zramd.cli import main

main()

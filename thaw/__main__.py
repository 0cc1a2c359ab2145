"""``python -m thaw``."""

from thaw.cli import main

main()

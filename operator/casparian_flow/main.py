"""`python -m casparian_flow.main`: the Sentinel alone, as `casparian sentinel` runs it."""

import sys

from casparian_flow.cli import main

if __name__ == "__main__":
    sys.exit(main(["sentinel", *sys.argv[1:]]))

import sys

from casparian_flow.cli import main

sys.exit(main())

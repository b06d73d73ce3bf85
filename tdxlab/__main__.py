"""`python -m tdxlab` is the command `tdxlab`."""

import sys

from tdxlab.cli import main

sys.exit(main())

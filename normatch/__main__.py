"""`python -m normatch` is the command `normatch`."""

import sys

from .cli import main

sys.exit(main())

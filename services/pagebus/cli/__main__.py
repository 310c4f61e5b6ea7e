"""`python -m pagebus.cli` is the `pagebus` command; the launcher starts its processes so."""

import sys

from pagebus.cli.main import main

sys.exit(main())

"""`python -m pagebus.cli` is the `pagebus` command; the launcher starts its processes so."""

import logging
import os
import sys

from pagebus.cli.lifeline import is_launched
from pagebus.cli.main import main

code = main()
if is_launched():
    # Nothing is left to save, and taking torch's modules apart takes seconds on a busy machine.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)

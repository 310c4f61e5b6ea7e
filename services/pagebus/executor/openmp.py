"""Tells OpenMP's threads to spin briefly. Imported before torch: libgomp reads this when it is loaded.

By default a thread that waits for the others spins for a long time. Where anything else runs on the cores,
it spins in the very time that the others need. Measured in turns on two busy cores: a decode step of one row
of the bundled model took 300 to 400 ms (median) instead of 10 to 17. Whoever sets GOMP_SPINCOUNT or
OMP_WAIT_POLICY has it their way.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

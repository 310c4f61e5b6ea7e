"""Tells OpenMP's threads to spin briefly. Imported before torch: libgomp reads this when it is loaded.

By default a thread that waits for the others spins for a long time. Where anything else runs on the cores,
it spins in the very time that the others need: measured on two busy cores, a decode step of the bundled
model took 140 to 660 ms instead of 9 to 25. Whoever sets GOMP_SPINCOUNT or OMP_WAIT_POLICY has it their way.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

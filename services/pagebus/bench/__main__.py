"""`python -m pagebus.bench NAME` is `pagebus bench NAME`, where the command is not installed."""

import sys

from pagebus.cli.bench import bench
from pagebus.cli.errors import CommandError

if __name__ == "__main__":
    try:
        sys.exit(bench(sys.argv[1:]))
    except CommandError as error:
        print(f"pagebus bench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""python -m veloxquant_mlx: the command line without the entry point."""

import sys

from veloxquant_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python tools/compare_runs.py RUN_DIR...`: the same as `fomoe compare`."""

import sys

from fomoe_pl.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])

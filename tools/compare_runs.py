"""`python tools/compare_runs.py RUN_DIR...`: the same as `fomoe compare`."""

from fomoe_pl.compare import main

if __name__ == "__main__":
    main()

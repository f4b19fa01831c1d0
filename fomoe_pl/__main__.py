"""`python -m fomoe_pl` is `fomoe`."""

from fomoe_pl.cli import main

if __name__ == "__main__":
    main()

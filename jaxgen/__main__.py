"""`python -m jaxgen` is the command `jaxgen`."""

from jaxgen.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

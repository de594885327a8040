"""`python -m jaxq`: the command line."""

from jaxq.cli import main

if __name__ == "__main__":
    main()

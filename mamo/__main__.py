"""Run the `mamo` command as `python -m mamo`."""

from mamo.cli import main

if __name__ == "__main__":
    main()

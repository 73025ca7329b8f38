"""Run `mamo demo`."""

from mamo.cli import run_command

if __name__ == "__main__":
    run_command("demo")

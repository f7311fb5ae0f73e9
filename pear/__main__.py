"""`python -m pear`: the command `pear`, for launchers that start a module."""

from pear.cli import app

if __name__ == "__main__":
    app(prog_name="pear")

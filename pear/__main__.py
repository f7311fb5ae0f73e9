"""The command `pear`, also as `python -m pear` for launchers that start a module."""

import sys


def main() -> None:
    try:
        from pear.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "pear").startswith("pear"):
            raise
        sys.exit(f"error: {error.name} is not installed, which pear needs: pip install 'pear-kernels[train]'")
    app(prog_name="pear")


if __name__ == "__main__":
    main()

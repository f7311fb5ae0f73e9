"""The command `pear`, also as `python -m pear` for launchers that start a module."""

import sys
import traceback


def main() -> None:
    try:
        from pear.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "pear").startswith("pear"):
            raise
        sys.exit(f"error: {error.name} is not installed, which pear needs: pip install 'pear-kernels[train]'")
    from pear.shown import install, many_lines

    install()
    try:
        app(prog_name="pear")
    except Exception:  # a fault of the program: what the traceback holds of data must not control the terminal either
        sys.exit(many_lines(traceback.format_exc()))


if __name__ == "__main__":
    main()

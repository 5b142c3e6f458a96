"""What is said where a package is missing: one message, with the extra that brings it."""

import sys
from contextlib import contextmanager


def missing(package: str, extra: str = "train") -> str:
    """The message; `extra` is one of pyproject.toml's."""
    return (
        f'{package} is missing: pip install "kdkernels[{extra}]", '
        f'or pip install -e ".[{extra}]" in a checkout'
    )


@contextmanager
def needed():
    """Around a program's imports: a missing package ends it with the message, exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "kdkernels").startswith("kdkernels"):
            raise
        print(f"error: {missing(error.name)}", file=sys.stderr)
        sys.exit(2)

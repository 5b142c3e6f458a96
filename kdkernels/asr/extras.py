"""The message about a missing package, with the extra that installs it."""

import sys
from contextlib import contextmanager


def missing(package: str, extra: str = "train") -> str:
    """`extra` is one of those in pyproject.toml."""
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

"""What every script does around its work: logging, and one clear line with exit code 2 for a user's mistake."""

import logging
import os
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `ValueError` or `OSError` becomes one message on stderr and exit code 2.

    Set the environment variable `MAMO_TRACEBACK=1` to see where it came from.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("MAMO_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(130)

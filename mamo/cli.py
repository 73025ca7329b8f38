"""What every script does around its work: logging, and one clear line with exit code 2 for a user's mistake."""

import logging
import os
import sys
from collections.abc import Callable

from mamo.training.preemption import Preempted


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `ValueError` or `OSError` becomes one message on stderr and exit code 2.

    SIGTERM, once the step is saved, is exit code 143, Ctrl-C 130. Set the environment variable `MAMO_TRACEBACK=1` to
    see where an error came from. Of several processes only the first logs.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("MAMO_TRACEBACK"):
            raise
        if not is_first and "mamo.trainer" not in sys.modules:  # a config, which all processes read alike
            sys.exit(2)
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except Preempted as end:
        print(end, file=sys.stderr)
        sys.exit(Preempted.EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(130)

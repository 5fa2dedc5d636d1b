"""The command, as `deploykit` or `python -m deploykit`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends quietly

from deploykit.cli import main

if __name__ == "__main__":
    main()

"""A program that Ctrl-C reaches while it imports what it needs."""

import os
import signal
import subprocess


def interrupted(command, **environment):
    """Interrupt a command when it has written a line; return its exit status and standard error."""
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a shell ignores Ctrl-C, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as program:
        try:
            assert program.stdout.readline()
            program.send_signal(signal.SIGINT)
            _, told = program.communicate(timeout=60)
        finally:
            program.kill()
    return program.returncode, told

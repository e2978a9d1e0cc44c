"""The two kinds of failure a user meets, and the exit codes that tell scripts which one it was."""

from __future__ import annotations


class FtlaunchError(Exception):
    """Base of everything that is shown as a message instead of a traceback."""

    exit_code = 2


class UserError(FtlaunchError):
    """Something the user can mend: the message says what, where and how. Exit code 1."""

    exit_code = 1


class InfrastructureError(FtlaunchError):
    """A machine, network or storage failed; the same command may work elsewhere or later. Exit code 2."""

    exit_code = 2


class Interrupted(FtlaunchError):
    """Stopped on request after saving. Exit code 130, as shells expect of Ctrl-C."""

    exit_code = 130

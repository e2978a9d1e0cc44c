"""The two kinds of failure a user meets, and the exit codes that tell scripts which one it was."""

from __future__ import annotations


class FtlaunchError(Exception):
    """Base of everything that is shown as a message instead of a traceback."""

    exit_code = 2


class UserError(FtlaunchError):
    """Something the user can mend: the message says what, where and how. Exit code 1."""

    exit_code = 1


class KeyedError(UserError):
    """A mistake in the value of one of the recipe's keys (dotted, with numbers for list items), found when it was used.
    Who knows the recipe's file can say where the key stands in it."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class RankError(UserError):
    """A mistake that shows on one rank only: which tells it, because no other one will."""


class Superseded(UserError):
    """A newer attempt goes on with the run. This one was taken for dead, and must change nothing any more: nor would it
    help to start it again."""


class InfrastructureError(FtlaunchError):
    """A machine, network or storage failed; the same command may work elsewhere or later. Exit code 2."""

    exit_code = 2


class Interrupted(FtlaunchError):
    """Stopped on request after saving. Exit code 130, as shells expect of Ctrl-C."""

    exit_code = 130

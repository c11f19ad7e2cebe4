"""The base of all errors that a user can mend: the command line prints them without a traceback."""


class UserError(Exception):
    """Names what was found where, what was expected, and how to mend it."""

    status = 2
    """With which the command line ends."""


class LostRankError(UserError):
    """Another rank was stopped, was killed or lost its host: nothing is wrong with this one."""

    status = 69  # EX_UNAVAILABLE

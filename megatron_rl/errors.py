"""The bases of all errors that a user can fix: the command line prints them without a traceback, with status 2."""


class UserError(Exception):
    """Names what was found where, what was expected, and how to fix it."""

    status = 2
    """Exit status of the command line."""


class LostRankError(UserError):
    """Another rank was stopped, was killed or lost its host: nothing is wrong with this one."""

    status = 69  # sysexits.h's EX_UNAVAILABLE


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the user named, or that one of those should hold, and that is not there.

    A FileNotFoundError of another class comes from a library: it is a fault of the program and keeps its traceback.
    """


class FileInTheWayError(UserError, FileExistsError):
    """A file or directory that would have to be overwritten."""

"""Base classes of errors that the user can fix. The command line prints them without a traceback."""


class UserError(Exception):
    """Names what was found where, what was expected, and how to fix it."""

    status = 2
    """Exit status of the command line."""


class LostRankError(UserError):
    """Another rank was stopped, was killed or lost its host; this rank is healthy."""

    status = 69  # EX_UNAVAILABLE of sysexits.h


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory is missing that the user named, or that a directory of the user's should hold.

    Any other FileNotFoundError comes from a library: it is a fault of the program and keeps its traceback.
    """


class FileInTheWayError(UserError, FileExistsError):
    """A file or directory is in the way and will not be overwritten."""

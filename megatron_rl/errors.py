"""The base of all errors that a user can mend: the command line prints them without a traceback."""


class UserError(Exception):
    """Names what was found where, what was expected, and how to mend it."""

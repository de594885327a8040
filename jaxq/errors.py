"""The one error class for input that a user can mend."""


class JaxqError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

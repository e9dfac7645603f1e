"""The one exception for bad input: what was wrong, what was expected, what to do."""


class InputError(ValueError):
    """Bad input from the user. The command line prints its message as one line and exits with status 2."""


class TrainingStopped(RuntimeError):
    """The loss or the gradient is no longer finite; the message names the step. Exit status 1."""

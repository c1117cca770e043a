"""Every error this project raises on purpose.

    UnclipError
    ├── ConfigError(ValueError)      a setting that is unknown, of the wrong type or impossible
    ├── InputError(ValueError)       data that a user gave and that cannot be used
    ├── ShapeError(ValueError)       a tensor of the wrong shape
    ├── CheckpointError              a checkpoint that is missing, damaged or made for something else
    ├── NonFiniteError               a loss or gradient that is not a number
    ├── StoppedError                 a training that was asked to stop, and can go on
    ├── StorageError                 a folder or bucket that cannot be read or written
    ├── AlreadyRunningError          another run holds the same storage
    └── StageError                   a stage of a pipeline that failed

Messages read `where: got X, expected Y. Remedy.` Command lines print them as one line; `exit_code` says what they exit with.
"""


class UnclipError(Exception):
    """An error with a message meant for people; never shown with a traceback."""

    exit_code = 1


class ConfigError(UnclipError, ValueError):
    exit_code = 2


class InputError(UnclipError, ValueError):
    exit_code = 2


class ShapeError(UnclipError, ValueError):
    pass


class CheckpointError(UnclipError):
    pass


class NonFiniteError(UnclipError):
    pass


class StoppedError(UnclipError):
    exit_code = 75  # EX_TEMPFAIL: the same command goes on


class StorageError(UnclipError):
    exit_code = 2


class AlreadyRunningError(UnclipError):
    exit_code = 75  # EX_TEMPFAIL: try again later


class StageError(UnclipError):
    pass

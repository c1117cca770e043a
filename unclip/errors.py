"""Errors that this project raises on purpose.

    UnclipError
    ├── ConfigError(ValueError)      a setting that is unknown, of the wrong type or invalid
    ├── InputError(ValueError)       user data that cannot be used
    ├── ShapeError(ValueError)       a tensor of the wrong shape
    ├── CheckpointError              a checkpoint that is missing, damaged or of another model
    ├── NonFiniteError               a loss, gradient, image or embedding that is not finite
    ├── StoppedError                 a training that was asked to stop and can be resumed
    ├── StorageError                 a folder or bucket that cannot be read or written
    │   └── DamagedError             a file whose content is not what was written
    ├── AlreadyRunningError          another run that uses the same storage
    └── StageError                   a pipeline stage that failed

Messages read `where: got X, expected Y. Remedy.` The command line prints them as one line and exits with `exit_code`.
"""


class UnclipError(Exception):
    """Error with a message for users; shown without a traceback."""

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
    exit_code = 75  # EX_TEMPFAIL: the same command resumes


class StorageError(UnclipError):
    exit_code = 2


class DamagedError(StorageError, ValueError):
    pass


class AlreadyRunningError(UnclipError):
    exit_code = 75  # EX_TEMPFAIL: try again later


class StageError(UnclipError):
    pass

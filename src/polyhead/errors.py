"""The few exceptions a user meets: one line that says what was wrong, its value, what to do."""


class PolyheadError(ValueError):
    """Anything a user can mend; the command line prints it as one line and exits with code 2."""


class ConfigError(PolyheadError):
    """A setting that cannot be, or that nothing here reads although it would change the numbers."""


class FileError(PolyheadError):
    """A file that is missing, truncated, lying about its contents, or in the way."""


class DataError(PolyheadError):
    """Texts, ids or labels that cannot be used as they are."""


class SlowerWarning(UserWarning):
    """Something that is missing here is made up for, slower; the command line says it, too."""

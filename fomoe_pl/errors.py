"""The one error for settings a user can correct."""


class ConfigError(ValueError):
    """A setting that cannot work, told in one message: what it is, which rule it breaks, what to do.

    Args:
        key: Dotted name of the setting as the user writes it, e.g. ``model.architecture.n_experts``.
        value: The value that was given.
        rule: The rule that the value breaks, without a final full stop.
        hint: What would be valid, preferably the list of valid values.
    """

    def __init__(self, key: str, value: object, rule: str, hint: str) -> None:
        # All four go to ValueError, so that the error survives pickling on its way out of a spawned process.
        super().__init__(key, value, rule, hint)
        self.key = key
        self.value = value
        self.rule = rule
        self.hint = hint

    def __str__(self) -> str:
        """Return ``KEY = VALUE: RULE. HINT`` on one line."""
        return f"{self.key} = {self.value!r}: {self.rule}. {self.hint[:1].upper()}{self.hint[1:]}"


def config_error_in(error: BaseException | None) -> ConfigError | None:
    """Return the ConfigError that an exception is, or that it was raised from or during; None if there is none."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error

"""After training: export to and import from Hugging Face folders, generation, evaluation.

transformers and lm-evaluation-harness are optional; `needs` says what to install where one is missing.
"""

from importlib.util import find_spec

from fomoe_pl.errors import ConfigError
from fomoe_pl.shipped import how_to_install

EXTRAS = {"transformers": "export", "lm_eval": "evaluate"}


def needs(package: str, command: str) -> None:
    """Refuse a command whose optional package is not installed.

    Args:
        package: What is imported.
        command: What was typed.

    Raises:
        ConfigError: Saying what to install.
    """
    if find_spec(package) is None:
        rule = f"needs {package}, which is not installed"
        raise ConfigError("fomoe", command, rule, how_to_install(EXTRAS[package]))

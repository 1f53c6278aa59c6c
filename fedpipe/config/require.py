"""The one check that every section of the configuration makes of its own values."""

from __future__ import annotations

from fedpipe.errors import ConfigError


def require(condition: bool, key: str, expectation: str, value: object, way_out: str = "") -> None:
    """Refuse a value.

    Args:
        condition: What must hold.
        key: Dotted, as in the YAML.
        expectation: What would be right, in words.
        value: What is there.
        way_out: A sentence on what to do, where the expectation does not say it already.

    Raises:
        ConfigError: The condition does not hold.
    """
    if not condition:
        hint = f" {way_out}" if way_out else ""
        raise ConfigError(f"{key}: expected {expectation}, got {value!r}.{hint}")

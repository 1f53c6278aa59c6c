"""The checks that every section of the configuration makes of its own values."""

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


def at_least(section: object, prefix: str, **bounds: float) -> None:
    """Refuse values below their bounds.

    Args:
        section: Part of a configuration.
        prefix: Its dotted key, with a dot at the end.
        **bounds: By the name of a field.

    Raises:
        ConfigError: A value is too small.
    """
    for name, bound in bounds.items():
        value = getattr(section, name)
        require(value >= bound, f"{prefix}{name}", f"{bound} or more", value)


def folder_name(value: str) -> None:
    """Refuse a ``name`` that does not name one folder below ``runs``.

    Args:
        value: The name of a run.

    Raises:
        ConfigError: It is empty, names another place or has a character that cannot be shown.
    """
    require(
        value not in ("", ".", "..") and "/" not in value and value.isprintable(),
        "name",
        "the name of one folder, for the default directory runs/NAME",
        value,
        "Choose another name; --run-dir takes any path.",
    )


def above_zero(section: object, prefix: str, *names: str) -> None:
    """Refuse values that are not above 0. ``None`` stands for a default and passes.

    Arguments are those of ``at_least``, with the names of the fields.

    Raises:
        ConfigError: A value is 0 or less.
    """
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}{name}", "a value above 0", value)

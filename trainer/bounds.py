"""Bounds of a config's numbers, for the `__post_init__` of the dataclass that owns them."""


def at_least(low: int, config: object, *names: str) -> None:
    """ValueError, beginning with the field's name, for the first of `names` in `config` whose value is below `low`."""
    for name in names:
        value = getattr(config, name)
        if value < low:
            raise ValueError(f"{name}: {value} must be at least {low}")


def at_most(high: float, config: object, *names: str) -> None:
    """The same for values above `high`."""
    for name in names:
        value = getattr(config, name)
        if value > high:
            raise ValueError(f"{name}: {value} must be at most {high:,}")


def above_zero(config: object, *names: str) -> None:
    """The same for values that must be above 0; None is no value and passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: {value} must be above 0")

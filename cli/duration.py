"""Durations as options of commands."""

from __future__ import annotations

import click

from cli.quantities import parse_duration


class Duration(click.ParamType[float]):
    """Seconds, or ``500ms``, ``90s``, ``30m``, ``2h``, ``7d``, ``2w``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, float):
            return value
        text = str(value).strip().lower()
        try:
            seconds = parse_duration(text if text[-1:].isalpha() else f"{text}s")
        except ValueError:
            seconds = 0.0
        if seconds <= 0:
            self.fail(f"{value!r} is no duration; write 30m, 2h or 7d", param, ctx)
        return seconds

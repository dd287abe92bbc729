"""The one form every benchmark prints: a JSON object on the last line of stdout."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """Samples by metric name; printed once at the end."""

    benchmark: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, better: str) -> None:
        """One sample; ``better`` is ``lower`` or ``higher``."""
        self.samples.setdefault(name, []).append(value)
        self.units[name] = (unit, better)
        print(f"  {name}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def median(self, name: str) -> float:
        """Median of the samples so far."""
        return statistics.median(self.samples[name])

    def print(self) -> None:
        """The JSON line."""
        metrics = {
            name: {
                "median": round(statistics.median(values), 4),
                "unit": self.units[name][0],
                "better": self.units[name][1],
                "samples": [round(value, 4) for value in values],
            }
            for name, values in self.samples.items()
        }
        print(json.dumps({"benchmark": self.benchmark, "machine": machine(), "metrics": metrics}))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }

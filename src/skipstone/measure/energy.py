"""Joules, where the machine tells: RAPL counters of the CPU packages, NVML's counter of a GPU. Both include idling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

NOT_MEASURABLE = "not measurable here"
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class EnergyMeter:
    """source: what is read. read: joules since some fixed moment, only ever growing."""

    source: str
    read: Callable[[], float]


def find_meter(device: torch.device, powercap: Path = POWERCAP) -> EnergyMeter | None:
    """The meter of the machine that computes on `device`; None where it has none that this user may read."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> EnergyMeter | None:
    """CPU packages only: the domains inside a package (intel-rapl:0:1) would count twice."""
    packages = [folder for folder in sorted(powercap.glob("*-rapl:*")) if folder.name.count(":") == 1]
    try:
        counters = [_Wrapping(folder) for folder in packages]
    except (OSError, ValueError):  # readable by root alone on many machines
        return None
    return EnergyMeter(source="RAPL", read=lambda: sum(counter() for counter in counters)) if counters else None


class _Wrapping:
    """A counter in microjoules that starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = self._now(), 0

    def __call__(self) -> float:
        now = self._now()
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total / 1e6

    def _now(self) -> int:
        return int(self._file.read_text())


def _nvml(device: torch.device) -> EnergyMeter | None:
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return EnergyMeter(source="NVML", read=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)

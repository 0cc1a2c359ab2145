"""Policies that answer each tick with a number of instances: Knative's, KEDA's and IceBreaker's.

In: an :class:`~scaler.simulate.counts.Observation`. Out: instances wanted. Played by :mod:`scaler.simulate.counts`; an object
serves one function. Pure.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaler.simulate.counts import Observation

#: A forecast below this is rounding of the transform, not demand.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class KpaSettings:
    """Knative's defaults (``config-autoscaler``), for instances that serve one request at a time.

    Attributes:
        tick_s: between two decisions.
        stable_s: the stable window.
        panic_s: the panic window.
        panic_ratio: wished over ready instances that makes panic.
        target: concurrency wanted per instance, 70 % of 1.
        most_down: the wish is at least ready / this.
        most_up: the wish is at most ready x this.
        grace_s: from the wish for none to none.
    """

    tick_s: float = 2.0
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_ratio: float = 2.0
    target: float = 0.7
    most_down: float = 2.0
    most_up: float = 1000.0
    grace_s: float = 30.0


class Kpa:
    """Knative's autoscaler (``pkg/autoscaler/scaling/autoscaler.go``; windows as in ``aggregation/bucketing.go``).

    A window that is not full yet is averaged over its filled part; after a rest at zero it fills anew. Simplified: one
    sample a tick where Knative scrapes each second; the grace always lasts its whole length, of which it is the most; the
    activator always buffers.
    """

    request_activated = True

    def __init__(self, settings: KpaSettings | None = None) -> None:
        self._settings = settings or KpaSettings()
        self.tick_s = self._settings.tick_s
        self._window: deque[float] = deque(maxlen=round(self._settings.stable_s / self.tick_s))
        self._panic_ticks = round(self._settings.panic_s / self.tick_s)
        self._panic_since_s: float | None = None
        self._panic_most = 0
        self._zero_since_s: float | None = None
        self.settled = True

    def desired(self, seen: Observation) -> int:
        """The wish after clamps, panic and grace."""
        wish = self._wish(seen)
        if wish > 0:
            self._zero_since_s = None
            self.settled = False
            return wish
        if self._zero_since_s is None:
            self._zero_since_s = seen.now_s
        if seen.ready and seen.now_s - self._zero_since_s < self._settings.grace_s:
            return 1
        self._window.clear()
        self.settled = self._panic_since_s is None
        return 0

    def _wish(self, seen: Observation) -> int:
        settings = self._settings
        self._window.append(seen.concurrency)
        recent = list(self._window)[-self._panic_ticks :]
        ready = max(1, seen.ready)
        stable = math.ceil(sum(self._window) / len(self._window) / settings.target)
        panic = math.ceil(sum(recent) / len(recent) / settings.target)
        least, most = math.floor(ready / settings.most_down), math.ceil(ready * settings.most_up)
        if panic / ready >= settings.panic_ratio:
            self._panic_since_s = seen.now_s
        elif self._panic_since_s is not None and self._panic_since_s + settings.stable_s < seen.now_s:
            self._panic_since_s = None
            self._panic_most = 0
        wish = min(max(stable, least), most)
        if self._panic_since_s is None:
            return wish
        self._panic_most = max(self._panic_most, wish, min(max(panic, least), most))
        return self._panic_most


@dataclass(frozen=True)
class KedaSettings:
    """KEDA's defaults.

    Attributes:
        tick_s: ``pollingInterval``.
        lag_threshold: unfinished requests per instance.
        cooldown_s: from the last poll that saw lag to none.
    """

    tick_s: float = 30.0
    lag_threshold: int = 10
    cooldown_s: float = 300.0


class KedaLag:
    """KEDA's Kafka scaler (``pkg/scalers/kafka_scaler.go``): only a poll starts the first instance and stops the last.

    Lag is what has not ended: a consumer commits when it is done. A request that comes and ends between two polls is never
    seen. Simplified: the HPA looks at each poll (really each 15 s), without its tolerance and stabilisation window; there are
    always enough partitions and a committed offset. The engine gives an instance to each request that finds none free
    while others run, where KEDA's would queue: that favours it.
    """

    request_activated = False

    def __init__(self, settings: KedaSettings | None = None) -> None:
        self._settings = settings or KedaSettings()
        self.tick_s = self._settings.tick_s
        self._active_s = -math.inf
        self.settled = True

    def desired(self, seen: Observation) -> int:
        """ceil(lag / threshold), and 1 while the cooldown lasts."""
        if seen.unfinished:
            self._active_s = seen.now_s
        self.settled = seen.now_s - self._active_s >= self._settings.cooldown_s
        return 0 if self.settled else max(1, math.ceil(seen.unfinished / self._settings.lag_threshold))


@dataclass(frozen=True)
class SpectralSettings:
    """IceBreaker's constants.

    Attributes:
        tick_s: length of a sample and of the forecast.
        window: samples it looks at.
        harmonics: lowest ones kept beside the mean.
    """

    tick_s: float = 60.0
    window: int = 120
    harmonics: int = 10

    @property
    def least(self) -> int:
        """Samples below which the kept harmonics are the whole signal: no forecast yet."""
        return 2 * self.harmonics + 1


class Spectral:
    """IceBreaker's forecast (ASPLOS'22; as FeMux' ``Forecaster_IceBreaker.py`` has it), a minute ahead.

    Instances are the average concurrency forecast, rounded up. Simplified: one kind of node, so no utility score; before
    21 minutes it forecasts none; requests that find no instance start one.
    """

    request_activated = True

    def __init__(self, settings: SpectralSettings | None = None) -> None:
        self._settings = settings or SpectralSettings()
        self.tick_s = self._settings.tick_s
        self._window: deque[float] = deque(maxlen=self._settings.window)
        self.settled = False

    def desired(self, seen: Observation) -> int:
        """Instances for the minute that begins."""
        self._window.append(seen.concurrency)
        if not any(self._window):
            self.settled = len(self._window) == self._settings.window
            return 0
        self.settled = False
        if len(self._window) < self._settings.least:
            return 0
        return max(0, math.ceil(forecast(np.array(self._window), self._settings.harmonics) - _ROUNDING))


def forecast(samples: NDArray[np.float64], harmonics: int) -> float:
    """The sample after ``samples``: linear trend plus mean and lowest ``harmonics`` of the rest.

    The harmonics have the window as their period, so their continuation is their value at the window's begin: the sum of the
    coefficients' real parts. More than ``2 * harmonics`` samples are needed.
    """
    count = len(samples)
    centred = np.arange(count) - (count - 1) / 2
    slope = float(centred @ samples) / float(centred @ centred)
    coefficients = np.fft.rfft(samples - slope * np.arange(count)).real
    return float(coefficients[0] + 2 * coefficients[1 : harmonics + 1].sum()) / count + slope * count

"""Whose turn it is among tenants: virtual token counters.

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each tenant has a counter of
the service it got, in weighted tokens; the one with the least goes next. A tenant that comes back after a
pause is lifted to the others' level, so that nobody saves up service. For two tenants that always have
requests waiting, the services that they get never differ by more than 2 max(input weight x longest prompt,
output weight x tokens of a batch).
"""

from collections.abc import Iterable, Mapping

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class VirtualCounters:
    """Counters by tenant; each has a number, so that arrays can name it."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: a tenant's share relative to others; 1 where it is not named."""
        self._weights = dict(weights)
        self._numbers: dict[str, int] = {}
        self._values: list[float] = []
        self._shares: list[float] = []
        self._last_served = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def number(self, tenant: str) -> int:
        """The tenant's number; a new one begins at nothing."""
        number = self._numbers.get(tenant)
        if number is None:
            number = self._numbers[tenant] = len(self._values)
            self._values.append(0.0)
            self._shares.append(self._weights.get(tenant, 1.0))
        return number

    def value(self, tenant: str) -> float:
        """Weighted tokens of service, over the tenant's weight."""
        return self._values[self.number(tenant)]

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """The tenant had nothing waiting and has now; `waiting` are the others that have."""
        number = self.number(tenant)
        level = min((self.value(other) for other in waiting), default=self._last_served)
        self._values[number] = max(self._values[number], level)

    def pay_input(self, tenant: str, num_tokens: int) -> None:
        """A request of the tenant was admitted with a prompt of so many tokens to be computed."""
        number = self.number(tenant)
        self._values[number] += INPUT_WEIGHT * num_tokens / self._shares[number]
        self._last_served = self._values[number]

    def pay_output(self, number: int, num_tokens: int) -> None:
        """So many tokens were made for the tenant with this number."""
        self._values[number] += OUTPUT_WEIGHT * num_tokens / self._shares[number]

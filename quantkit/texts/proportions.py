"""How many sequences each part or domain of a text gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def split_proportionally(available: Mapping[str, int], total_share: int) -> dict[str, int]:
    """Split `total_share` over the domains in proportion to their available sequences.

    A domain never gets more than it has, and at least one if there is room.
    """
    total = sum(available.values())
    least = {name: min(count, 1) for name, count in available.items()}
    if sum(least.values()) > total_share:
        least = dict.fromkeys(available, 0)
    shares = {
        name: max(total_share * count // total, least[name]) for name, count in available.items()
    }

    def compute_deficit(name: str) -> int:  # times `total`: an integer, so rounding never decides
        return total_share * available[name] - shares[name] * total

    while (remaining := total_share - sum(shares.values())) != 0:
        if remaining > 0:
            shares[
                max(
                    (name for name in shares if shares[name] < available[name]), key=compute_deficit
                )
            ] += 1
        else:
            shares[
                min((name for name in shares if shares[name] > least[name]), key=compute_deficit)
            ] -= 1
    return shares


def move_missing(
    counts: Mapping[str, int], available: Mapping[str, int], receivers: Collection[str]
) -> dict[str, int]:
    """Return the sequences of each part, after those that parts lack moved to the receivers.

    available: sequences of the parts whose text is known to be little. Nothing changes if there is
    no other receiver.
    """
    missing = {name: counts[name] - most for name, most in available.items() if most < counts[name]}
    weights = {name: counts[name] for name in receivers if name not in missing and counts[name]}
    if not missing or not weights:
        return dict(counts)
    total = sum(missing.values())
    # times the total: a part may get more than its weight
    extra = split_proportionally({name: n * total for name, n in weights.items()}, total)
    return {
        name: count - missing.get(name, 0) + extra.get(name, 0) for name, count in counts.items()
    }

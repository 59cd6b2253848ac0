"""What a report does not say, for it would rest on too little."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LeftOut:
    """A figure that is not given, and why."""

    what: str
    reason: str

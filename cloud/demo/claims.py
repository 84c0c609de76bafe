"""What the story claims: each claim is checked against what was just measured; one that does not hold ends the demo with 3."""

import dataclasses

from skills.errors import NotReached


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, whether it holds, and the numbers that say so."""

    text: str
    holds: bool
    found: str = ""


class Claims:
    """All claims in the order in which they were checked."""

    def __init__(self) -> None:
        self.all: list[Claim] = []

    def check(self, text: str, holds: object, found: str = "") -> Claim:
        """Note a claim."""
        claim = Claim(text, bool(holds), found)
        self.all.append(claim)
        return claim

    def judge(self) -> None:
        """Return when every claim holds.

        Raises:
            NotReached: how many do not, and the first of them.
        """
        broken = [claim for claim in self.all if not claim.holds]
        if broken:
            raise NotReached(
                f"{len(broken)} of {len(self.all)} claims do not hold on this machine; the first: "
                f"{broken[0].text} ({broken[0].found})"
            )

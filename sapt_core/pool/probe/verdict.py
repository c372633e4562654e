"""What a probe found of a backbone, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sapt_core.data.collate import Sharing, Together, stricter

_ROWS: Mapping[Together, str] = {"any": "rows of any length", "alike": "rows of one length", "alone": "single rows"}


@dataclass(frozen=True)
class Verdict:
    """How training and answers go on a backbone.

    Attributes:
        model: its class.
        training, answering: which rows may share a forward.
        expected: which prompts may, by what the class says of itself.
        figures: by what was compared, how far it was off: logits by the root of their mean square as a share of their
            standard deviation, gradients by the largest as a share of the largest.
        allowed: what a difference may come to, for rounding.
        failed: by what was compared, what the class said where it could not be.
    """

    model: str
    training: Together
    answering: Together
    expected: Together
    figures: Mapping[str, float]
    allowed: float
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def otherwise(self) -> dict[str, Together]:
        """What of ``Sharing`` is to be otherwise than the class says of itself."""
        found, expected = Sharing(self.training, self.answering), Sharing(answering=self.expected)
        return {name: value for name, value in vars(found).items() if value != getattr(expected, name)}

    def joined(self, other: Verdict) -> Verdict:
        """What holds where both do: of one backbone with two kinds of blocks."""
        figures = {
            name: max(found.figures[name] for found in (self, other) if name in found.figures)
            for name in {**self.figures, **other.figures}
        }
        return Verdict(
            self.model,
            stricter(self.training, other.training),
            stricter(self.answering, other.answering),
            self.expected,
            figures,
            max(self.allowed, other.allowed),
            {**self.failed, **other.failed},
        )

    def __str__(self) -> str:
        taught, asked = _ROWS[self.training], _ROWS[self.answering]
        said = f"taught and asked with {taught}" if taught == asked else f"taught with {taught}, asked with {asked}"
        beyond = [
            f"{name}, its logits move by {figure:.2g} of their spread"
            for name, figure in self.figures.items()
            if figure > self.allowed
        ]
        beyond += [f"{name}, it fails ({why})" for name, why in self.failed.items()]
        return f"{self.model} is {said} in a batch{': ' if beyond else ''}{'; '.join(beyond)}"

"""A number that may be written as a fraction, as the field writes eps: ``8/255``."""

from __future__ import annotations


class Ratio(float):
    """A float that remembers how it was written, so that a config keeps ``8/255`` and not 0.03137254901960784.

    Args:
        value: a number, or text such as ``"8/255"`` or ``"0.5"``.

    Raises:
        ValueError: if the text is neither a number nor one number divided by another.
    """

    text: str

    def __new__(cls, value: float | str) -> Ratio:
        text = str(value).strip()
        top, slash, bottom = text.partition("/")
        try:
            number = super().__new__(cls, float(top) / float(bottom) if slash else float(top))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{text!r} is not a number: write 0.03 or a fraction such as 8/255") from None
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Ratio], tuple[str]]:
        return Ratio, (self.text,)

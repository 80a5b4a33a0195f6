"""One seeded fault: a small change of product code that the default test tier must detect.

The product is the code of recpress without its tests.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class NotApplicable(Exception):
    """The text that a fault replaces does not occur exactly once in its file."""

    def __init__(self, fault_id: str, file: str, occurrences: int) -> None:
        self.fault_id, self.file, self.occurrences = fault_id, file, occurrences
        super().__init__(
            f"Expected the text of fault {fault_id!r} once in {file}, got {occurrences}. "
            "Update the fault's 'old' text."
        )


@dataclass(frozen=True)
class Fault:
    """A change of one file and the tests that must fail because of it.

    Attributes:
        id: name on the command line; unique.
        file: path of the changed file, relative to the root of the repository.
        old: exact text that is replaced; occurs once in the file.
        new: the replacement.
        effect: the consequence of the fault, in one sentence.
        tests: pytest selections (files or node ids) of the default tier that detect it.
    """

    id: str
    file: str
    old: str
    new: str
    effect: str
    tests: tuple[str, ...]

    def patched(self, root: Path) -> str:
        """Return the file's text with the fault.

        Raises:
            NotApplicable: the old text does not occur exactly once.
        """
        text = (root / self.file).read_text()
        occurrences = text.count(self.old)
        if occurrences != 1:
            raise NotApplicable(self.id, self.file, occurrences)
        return text.replace(self.old, self.new)

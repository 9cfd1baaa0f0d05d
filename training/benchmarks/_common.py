"""What the benchmarks share: a resumable record of results, and Markdown tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scrdit_diffusers.atomic import write_atomically


class Record(dict):
    """Results as JSON, saved as they come, so that the same command continues after an interruption.

    Parameters
    ----------
    path
        File to write; continued if it exists.
    arguments
        What the results depend on.
    **empty
        Entries of a new record.

    Raises
    ------
    ValueError
        The file has results for other arguments.
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any], **empty: Any):
        super().__init__(empty, arguments=dict(arguments))
        self.path = path
        if path.exists():
            self.update({"arguments": {}} | json.loads(path.read_text()))  # an old record does not say its arguments
            before = self["arguments"]
            changed = {k: before.get(k) for k, v in json.loads(json.dumps(arguments)).items() if before.get(k) != v}
            if changed:
                raise ValueError(f"{path} is of other arguments: {changed}; give another --output_dir.")

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self, indent=2))


def to_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))

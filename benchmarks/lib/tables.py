"""Tables of results, as `sparsify bench` makes them of a user's own."""

from sparsify.commands.bench.tables import (
    Found,
    Row,
    by_device,
    conditions,
    failure,
    groups,
    kind,
    latest,
    markdown,
    measured,
    newest_device,
    short,
    size,
)

__all__ = [
    "Found",
    "Row",
    "by_device",
    "conditions",
    "failure",
    "groups",
    "kind",
    "latest",
    "markdown",
    "measured",
    "newest_device",
    "short",
    "size",
]

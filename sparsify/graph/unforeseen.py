"""What nobody foresaw while one site was looked at: it costs that site, not the graph, and is logged with its traceback."""

from __future__ import annotations

import logging

from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger(__name__)


def reason(error: Exception, where: str = "") -> str:
    """The refusal of a site for an exception, to be called where it is caught. How Dynamo asks to trace again passes through."""
    if isinstance(error, TorchDynamoException):
        raise error
    log.info("unforeseen at %s", where, exc_info=error)
    return f"a form that is not read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

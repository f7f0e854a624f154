"""Handles unexpected exceptions while a site is matched: that site alone is refused, and the traceback is logged."""

from __future__ import annotations

import logging

from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger(__name__)

UNREAD = "a form that is not read"  # begins the reason


def reason(error: Exception, where: str = "") -> str:
    """The reason for refusing a site after an unexpected exception; call it in the except block.

    Raises:
        TorchDynamoException: the exception itself, when it is Dynamo's request to trace again.
    """
    if isinstance(error, TorchDynamoException):
        raise error
    log.info("unforeseen at %s", where, exc_info=error)
    return f"{UNREAD}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

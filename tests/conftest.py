"""Settings for all tests."""

from hypothesis import HealthCheck, settings

from tests.run_records import pytest_addoption, pytest_terminal_summary

__all__ = ["pytest_addoption", "pytest_terminal_summary"]

# How fast an example is drawn says more about the machine's load than about the code.
settings.register_profile("sparsify", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sparsify")

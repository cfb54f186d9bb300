"""What tests of inference share."""

import jax
import pytest


@pytest.fixture
def compilations():
    """Names of the events in which a program is made, as they come."""
    seen, listening = [], [True]

    def listen(event, seconds, **details):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            seen.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    listening.clear()

"""Hypothesis profiles, one torch thread, and the plugin where it is not installed."""

import gc

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester", "tbptt_props.plugin"]

# One thread: the sizes are tiny, and a second thread may change the order of a sum.
torch.set_num_threads(1)

# No deadline: a Trainer's first fit imports half of Lightning.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Have the kit's looks for graphs that live on pass over what is there from the beginning."""
    gc.collect()
    gc.freeze()

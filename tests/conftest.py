"""Properties are tried with the same examples each time, so that a failure can be had again; `make test-all` draws new ones."""

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("same")

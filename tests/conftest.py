from hypothesis import settings

pytest_plugins = ["tests.fixtures_hub", "tests.fixtures_server"]

# How long a test takes says nothing about the code: machines are shared.
settings.register_profile("hubsync", deadline=None)
settings.load_profile("hubsync")

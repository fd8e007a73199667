pytest_plugins = ["tests.fixtures_hub", "tests.fixtures_server"]

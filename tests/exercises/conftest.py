"""Registers the markers of the exercises: `python -m pytest -m exercise_6`."""


def pytest_configure(config):
    for number in range(1, 22):
        config.addinivalue_line("markers", f"exercise_{number}: the checks of exercise {number}")

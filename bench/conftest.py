"""pytest-benchmark's JSON carries our facts about the machine too."""

from bench import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["pear"] = machine.facts()

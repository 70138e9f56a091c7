"""Ships what is no Python inside the wheel: the Hydra tree of `configs/` as `vexact/configs`, and the report's page.

Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vexact", "vexact.*"]), "vexact.configs"],
    package_dir={"vexact.configs": "configs"},
    package_data={
        "vexact.configs": ["*.yaml", "recipe/*.yaml"],
        "vexact.report.html": ["page.css", "page.html.j2", "page.js"],
    },
)

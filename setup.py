"""Ships the Hydra tree of `configs/` inside the wheel as `vexact/configs`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vexact", "vexact.*"]), "vexact.configs"],
    package_dir={"vexact.configs": "configs"},
    package_data={"vexact.configs": ["*.yaml", "recipe/*.yaml"]},
)

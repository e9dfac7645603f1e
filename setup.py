"""Which folders are which packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["fastgpt", "fastgpt.*"]), package_data={"fastgpt": ["py.typed"]})

"""Which folders are which packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), "fastgpt.kernels"],
    # The Triton kernels are a top-level folder here, for readers; installed, they belong to the package: a
    # top-level `kernels` in site-packages would collide with the PyPI package of that name.
    package_dir={"fastgpt.kernels": "kernels"},
    package_data={"fastgpt": ["py.typed"]},
)

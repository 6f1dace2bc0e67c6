"""What pyproject.toml cannot express: folders outside mmbert/ that are installed inside the package."""

from setuptools import find_namespace_packages, setup

FOLDERS = {
    "mmbert.presets": "configs",
    "mmbert.generators.shapes": "data/shapes",
    "mmbert.generators.easy_vqa": "data/easy_vqa",
}

setup(
    packages=[
        *find_namespace_packages(include=["mmbert", "mmbert.*"]),
        *FOLDERS,
        *(f"mmbert.presets.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir=FOLDERS,
)

"""What pyproject.toml cannot say: the notebooks, and what they read, travel inside the wheel.
`fakit.files.shipped` finds them.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "data", "docs", "notebooks")  # beside each other, as in a clone


class WithNotebooks(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # `pip install -e` finds them in the clone
        for folder in SHIPPED:
            target = Path(self.build_lib, "fakit", "_shipped", folder)
            shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left files that are gone
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))


setup(cmdclass={"build_py": WithNotebooks})

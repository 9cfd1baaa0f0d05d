"""Import the scripts of training/, which are not part of the package."""

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TRAINING = REPOSITORY / "training"
sys.path.append(str(TRAINING))  # scripts import each other by name


def load_script(name):
    """Import a script anew, so that what a test changes in it is gone."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

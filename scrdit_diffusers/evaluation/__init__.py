"""Evaluation of generated cells: comparison with real cells, baselines, figures, report and model card."""

from importlib.util import find_spec

for _name in ("jinja2", "matplotlib", "ot", "scanpy", "sklearn"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"scrdit_diffusers.evaluation needs {_name}, which is not installed: pip install 'scrdit-diffusers[train]'",
            name=_name,
        )

"""Evaluation of generated cells: comparison with real cells, baselines, figures, report and model card."""

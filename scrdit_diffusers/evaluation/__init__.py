"""How generated cells are evaluated: comparison with real cells, baselines, figures, report and model card."""

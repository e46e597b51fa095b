"""An evaluation as files: results, grids, curves, one page."""

"""Measures of pictures, each a function of features. Nothing here draws or reports."""

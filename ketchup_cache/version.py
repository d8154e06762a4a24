"""The version of the package, and the name it signs its files with."""

__version__ = "0.1.0"
TOOL = f"ketchup-cache {__version__}"
"""Stands in every manifest, run and export."""

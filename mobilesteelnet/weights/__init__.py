"""The trained weights that the package brings along, with their card."""

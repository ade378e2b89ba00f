"""Files that a run leaves for its user: results and heat maps."""

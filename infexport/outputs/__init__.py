"""Files that a run writes for its user: results and heat maps."""

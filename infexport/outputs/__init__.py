"""Files that people take home: results and heat maps."""

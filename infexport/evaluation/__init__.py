"""Is a bundle right, and how fast is it: parity, accuracy, centrality, benchmark, report."""

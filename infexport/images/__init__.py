"""Find, fetch, decode and prepare images, whole or in strips."""

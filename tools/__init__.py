"""What builds the documentation: the site, the HTTP reference, the memory table."""
